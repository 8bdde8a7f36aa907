"""The keep-alive timeout of a connection whose requests are refused below the framework."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.server import ServerState

from server.http.connection.early_refusal import EarlyRefusal
from server.http.connection.protocol import Connection
from server.http.server_config import ServerConfig
from server.settings.server import Settings
from tests.http.connection.test_early_refusal import BODY, Closed
from tests.http.connection.test_framing import SilentTransport
from tests.http.connection.test_slow_clients import request_for, status_of

REQUEST = request_for("/generate", BODY)


async def app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("no request reaches the app")


def opened(keep_alive: int) -> tuple[Connection, SilentTransport]:
    served: Any = app
    served.state = SimpleNamespace(early_refusal=EarlyRefusal(Closed(), Settings()))
    config = ServerConfig(served, Settings(), timeout_keep_alive=keep_alive)
    connection, transport = Connection(config, ServerState(), {}), SilentTransport()
    connection.connection_made(transport)
    return connection, transport


@pytest.mark.parametrize("missing", [0, 1, 20])
def test_a_refused_connection_times_out_when_its_whole_request_has_arrived(missing: int) -> None:
    async def work() -> None:
        connection, transport = opened(keep_alive=30)
        first = len(REQUEST) - missing
        connection.data_received(REQUEST[:first])
        assert status_of(transport.written) == 429
        assert (connection.timeout_keep_alive_task is None) == bool(missing)  # the head's clock runs then
        if missing:
            connection.data_received(REQUEST[first:])
        assert connection.timeout_keep_alive_task is not None
        connection.connection_lost(None)

    asyncio.run(work())


def test_a_connection_in_use_is_kept_and_an_idle_one_is_closed() -> None:
    async def work() -> None:
        connection, transport = opened(keep_alive=30)
        connection.data_received(REQUEST)
        connection.timeout_keep_alive_handler()  # called early, as after further requests
        assert not transport.is_closing()
        assert connection.timeout_keep_alive_task is not None
        connection._idle_since -= 31
        connection.timeout_keep_alive_handler()
        assert transport.is_closing()
        connection.connection_lost(None)

    asyncio.run(work())
