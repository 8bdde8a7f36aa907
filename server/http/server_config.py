"""uvicorn's configuration for every server of the app, in production and in tests."""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from server.http.connection.early_refusal import EarlyRefusal
from server.http.connection.framing import HEAD_BYTES
from server.http.connection.open_connections import OpenConnections
from server.http.connection.open_files import most_connections
from server.http.connection.protocol import Connection
from server.http.connection.refusing_selector import loop_factory
from server.http.connection.turns import ParseTurns
from server.settings.server import Settings

KEEP_ALIVE_SECONDS = 30


class ServerConfig(uvicorn.Config):
    """Connections by ``Connection``, early refusal, limits and timeouts from the settings."""

    def __init__(self, app: FastAPI, settings: Settings, **others: Any) -> None:
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            loop="asyncio",  # uvloop, if installed, keeps the files of closed sockets for longer
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="on",
            h11_max_incomplete_event_size=HEAD_BYTES,
            **{"timeout_keep_alive": KEEP_ALIVE_SECONDS, "timeout_graceful_shutdown": 1, **others},
        )
        self.receive_timeout = settings.receive_timeout
        self.reading_timeout = max(settings.request_timeout, settings.receive_timeout)
        self.turns = ParseTurns()
        self.connections = OpenConnections(most_connections(settings.max_connections))
        self.early_refusal: EarlyRefusal = app.state.early_refusal

    def get_loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop] | None:
        return loop_factory(self.early_refusal) or super().get_loop_factory()
