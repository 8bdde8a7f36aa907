"""The server process: listening, signals, exit codes.

The first SIGTERM or SIGINT drains: new requests get a 503, running ones may finish within the grace time.
The second exits at once. After ``Lifecycle.fail`` the process exits with a code other than 0, so that a
supervisor restarts it.
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
from typing import Protocol, cast

from fastapi import FastAPI

from server.http.connection.listening import Server
from server.http.connection.open_files import raise_limit
from server.http.server_config import ServerConfig
from server.lifecycle import EXIT_FAILED, Lifecycle
from server.settings.server import Settings

_COLLECT_AFTER = 10_000  # new objects; Python's default of 700 is reached within a few refusals
_FLUSH_SECONDS = 0.5  # for final errors to reach clients
_log = logging.getLogger(__name__)


class ServedState(Protocol):
    """What the process reads and calls of ``server.state.AppState``."""

    @property
    def lifecycle(self) -> Lifecycle: ...

    @property
    def in_flight(self) -> int: ...

    def fail_running(self, reason: str) -> None: ...


class Process(Server):
    """Runs the app until a signal or a failure; ``serve_forever`` returns the exit code."""

    def __init__(
        self, app: FastAPI, settings: Settings, on_listening: Callable[[int], None] = lambda port: None
    ) -> None:
        raise_limit()
        super().__init__(ServerConfig(app, settings))
        self._app, self._settings, self._on_listening = app, settings, on_listening
        self._signals = 0

    def serve_forever(self) -> int:
        """Blocks until the server has stopped; returns the process's exit code."""
        # imported modules are half a million objects that stay: without freezing them, every full collection
        # traverses them and stalls the event loop
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
        try:
            self.run()
        except SystemExit:  # uvicorn has logged the reason
            _log.error("can't listen on %s, port %d", self._settings.host, self._settings.port)
            return EXIT_FAILED
        return self._lifecycle.exit_code if self.started else EXIT_FAILED

    @property
    def _state(self) -> ServedState:
        return cast(ServedState, self._app.state)

    @property
    def _lifecycle(self) -> Lifecycle:
        return self._state.lifecycle

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._lifecycle.subscribe(self._on_change)
            port = self.servers[0].sockets[0].getsockname()[1] if self.servers else self._settings.port
            self._on_listening(port)
            if self._lifecycle.fatal is not None:  # before the subscription
                self._on_change()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1 or not self.started:
            self.should_exit = self.force_exit = True
            # the cancelled lifespan is no error
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
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
        done = await self._idle_within(grace)
        if not done and lifecycle.fatal is None:
            # clients receive an error, not a closed connection
            self._state.fail_running("the server is shutting down")
        await asyncio.sleep(_FLUSH_SECONDS if lifecycle.fatal or not done else 0)
        # everything is computed; responses may still be on their way to slow clients
        self.config.timeout_graceful_shutdown = max(1, math.ceil(until - time.monotonic()))
        self.should_exit = True

    async def _idle_within(self, seconds: float) -> bool:
        """Whether all requests ended within ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._state.in_flight:
                    await asyncio.sleep(0.05)
                return True
        return False
