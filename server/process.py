"""The process around the app: listening, signals, exit codes.

The first SIGTERM or SIGINT drains: new requests get a 503, running ones may finish within the grace time.
The second ends at once. A server that can't go on (``Lifecycle.fail``) exits with code 70, so that a
supervisor restarts it.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.connection import ServerConfig
from server.lifecycle import Lifecycle
from server.settings import Settings

EXIT_FAILED, EXIT_SOFTWARE = 1, 70
_FLUSH_SECONDS = 0.5  # for terminal errors on their way to clients
_log = logging.getLogger(__name__)


class Process(uvicorn.Server):
    """Runs the app until it is told to end; ``serve`` returns the exit code."""

    def __init__(
        self, app: FastAPI, settings: Settings, on_listening: Callable[[int], None] = lambda port: None
    ) -> None:
        super().__init__(ServerConfig(app, settings))
        self._app, self._settings, self._on_listening = app, settings, on_listening
        self._signals = 0

    def serve_forever(self) -> int:
        """Blocks until the end; returns the process's exit code."""
        try:
            self.run()
        except SystemExit:  # the server beneath has said why
            _log.error("can't listen on %s, port %d", self._settings.host, self._settings.port)
            return EXIT_FAILED
        if not self.started:
            return EXIT_FAILED
        return EXIT_SOFTWARE if self._lifecycle.fatal else 0

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
        grace = _FLUSH_SECONDS if lifecycle.fatal else self._settings.graceful_termination_timeout
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._app.state.service.in_flight:
                    await asyncio.sleep(0.05)
        await asyncio.sleep(_FLUSH_SECONDS if lifecycle.fatal else 0)
        self.should_exit = True
