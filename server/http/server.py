"""The process around the app: listening, signals, exit codes.

The first SIGTERM or SIGINT drains: new requests get a 503, running ones may finish within the grace time.
The second ends at once. A server that can't go on (``Lifecycle.fail``) exits with a code other than 0, so
that a supervisor restarts it.
"""

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

from fastapi import FastAPI

from server.http.connection.listening import Server
from server.http.connection.open_files import raise_limit
from server.http.server_config import ServerConfig
from server.lifecycle import EXIT_FAILED, Lifecycle
from server.settings.server import Settings

_COLLECT_AFTER = 10_000  # objects more than before; Python's 700 come together within a few refusals
_FLUSH_SECONDS = 0.5  # for terminal errors on their way to clients
_log = logging.getLogger(__name__)


class Process(Server):
    """Runs the app until it is told to end; ``serve`` returns the exit code."""

    def __init__(
        self, app: FastAPI, settings: Settings, on_listening: Callable[[int], None] = lambda port: None
    ) -> None:
        raise_limit()
        super().__init__(ServerConfig(app, settings))
        self._app, self._settings, self._on_listening = app, settings, on_listening
        self._signals = 0

    def serve_forever(self) -> int:
        """Blocks until the end; returns the process's exit code."""
        # imported modules are half a million objects that stay: without this, every full collection walks
        # over them, and nobody is answered meanwhile
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
        try:
            self.run()
        except SystemExit:  # the server beneath has said why
            _log.error("can't listen on %s, port %d", self._settings.host, self._settings.port)
            return EXIT_FAILED
        return self._lifecycle.exit_code if self.started else EXIT_FAILED

    @property
    def _lifecycle(self) -> Lifecycle:
        lifecycle: Lifecycle = self._app.state.lifecycle
        return lifecycle

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._lifecycle.subscribe(self._on_change)
            port = self.servers[0].sockets[0].getsockname()[1] if self.servers else self._settings.port
            self._on_listening(port)
            if self._lifecycle.fatal is not None:  # sooner than anybody listened
                self._on_change()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1 or not self.started:
            self.should_exit = self.force_exit = True
            return
        _log.info("%s: draining", signal.Signals(sig).name)
        self._lifecycle.drain()

    def _on_change(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        lifecycle = self._lifecycle
        if lifecycle.fatal is not None:
            _log.error("%s: ending with code %d", lifecycle.fatal, lifecycle.exit_code)
        grace = _FLUSH_SECONDS if lifecycle.fatal else self._settings.graceful_termination_timeout
        until = time.monotonic() + grace
        done = await self._answered(grace)
        if not done and lifecycle.fatal is None:
            for engine in self._app.state.pool.engines:  # their readers are told, not cut off
                engine.fail("the server is shutting down")
        await asyncio.sleep(_FLUSH_SECONDS if lifecycle.fatal or not done else 0)
        # all is computed; what was answered may still be on its way to a slow reader
        self.config.timeout_graceful_shutdown = max(1, math.ceil(until - time.monotonic()))
        self.should_exit = True

    async def _answered(self, seconds: float) -> bool:
        """Whether all requests came to their end within that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._app.state.service.places.in_flight:
                    await asyncio.sleep(0.05)
                return True
        return False
