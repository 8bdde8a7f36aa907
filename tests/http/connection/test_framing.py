"""Requests that are slow to parse or have an ambiguous end: raw bytes on a real socket."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse
from uvicorn.server import ServerState

from server.http.connection.early_refusal import EarlyRefusal
from server.http.connection.framing import DRAINED_BYTES, FRAMING_BYTES
from server.http.connection.protocol import Connection
from server.http.connection.turns import FIRST_EVENTS, ParseTurns
from server.http.server_config import ServerConfig
from server.settings.server import Settings
from tests.conftest import serving
from tests.http.connection.test_early_refusal import Closed
from tests.http.connection.test_slow_clients import connected, received, request_for, status_of, still_serves

MakeApp = Callable[..., FastAPI]
CHUNKED = (
    "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
)
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = LIVE.replace(b"Host", b"Connection: close\r\nHost")


def in_chunks(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def statuses(said: bytes) -> list[int]:
    return [int(part.split()[0]) for part in said.split(b"HTTP/1.1 ")[1:]]


def keep_sending(connection: socket.socket, endless: bytes) -> Callable[[], None]:
    """Sends in a thread; returns a function that waits until the server ends it."""

    def send() -> None:
        try:
            while True:
                connection.sendall(endless)
        except OSError:
            pass

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread.join


@pytest.fixture
def measuring(make_app: MakeApp) -> Iterator[str]:
    """A server with a route that returns the length of a body."""
    app = make_app()

    @app.post("/length")
    async def length(request: Request) -> JSONResponse:
        return JSONResponse(len(await request.body()))

    with serving(app) as address:
        yield address


@pytest.mark.parametrize(("key", "status"), [("", 401), ("Authorization: Bearer right\r\n", 400)])
@pytest.mark.parametrize("endless", [b"1\r\nx\r\n" * 1000, b"1;" + b"e" * 4000 + b"\r\nx\r\n"])
def test_tiny_chunks_without_end_end_the_connection(
    make_app: MakeApp, key: str, status: int, endless: bytes
) -> None:
    app = make_app(api_key="right", receive_timeout=5)
    with serving(app) as address, connected(address) as connection:
        connection.sendall(f"{CHUNKED}{key}\r\n".encode())
        join = keep_sending(connection, endless)
        head, _, body = received(connection).partition(b"\r\n\r\n")
        connection.shutdown(socket.SHUT_RDWR)
        join()
        assert status_of(head) == status
        assert b"connection: close" in head.lower()
        assert json.loads(body)["error_type"] == ("unauthorized" if status == 401 else "validation")


def test_bodies_in_chunks_of_usual_and_unusual_sizes(measuring: str) -> None:
    """A small one in one-byte chunks; a large one takes many turns; the next request is parsed normally."""
    head = b"POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for size, chunk in ((FRAMING_BYTES // 8, 1), (1_000_000, 64), (1_900_000, 100_000)):
        with connected(measuring) as connection:
            threading.Thread(
                target=connection.sendall,
                args=(head + in_chunks(b"x" * size, chunk) + LAST,),
            ).start()
            said = received(connection)
            assert statuses(said) == [200, 200]
            assert b"\r\n\r\n%d" % size in said


class SilentTransport(asyncio.Transport):
    """A transport that collects writes and records whether reading is paused."""

    reading, closing = True, False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def can_write_eof(self) -> bool:
        return False

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def writelines(self, list_of_data: Any) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


def test_parsing_yields_to_the_event_loop() -> None:
    """However much arrives: a little is parsed at once, the rest in turns, during which reading is paused."""
    body = b"x" * 200_000
    taken = 0

    async def reader(scope: Any, receive: Any, send: Any) -> None:
        nonlocal taken
        while True:
            message = await receive()
            taken += len(message.get("body", b""))
            if message["type"] == "http.disconnect":
                return

    async def check() -> None:
        app: Any = reader  # a function, which can have attributes
        early_refusal = SimpleNamespace(judge=lambda *_: None)
        app.state = SimpleNamespace(early_refusal=early_refusal)
        config = ServerConfig(app, Settings())
        connections = [Connection(config, ServerState(), {}) for _ in range(3)]
        transports = [SilentTransport() for _ in connections]

        def parsed() -> int:
            return taken + sum(len(connection.cycle.body) for connection in connections)

        for connection, transport in zip(connections, transports, strict=True):
            connection.connection_made(transport)
            connection.data_received(f"{CHUNKED}\r\n".encode() + in_chunks(body, 64)[:-5])
            assert len(connection.cycle.body) <= 64 * FIRST_EVENTS
            assert not transport.reading
        passes = 0
        while parsed() < len(body) * len(connections):
            before = parsed()
            await asyncio.sleep(0)
            passes += 1
            assert parsed() - before < len(body)
        assert passes > len(connections)
        assert all(transport.reading for transport in transports)
        for connection in connections:
            connection.connection_lost(None)

    asyncio.run(check())


AMBIGUOUS = [
    "POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "POST /length HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 5\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n",
    "POST /length HTTP/1.1\r\nHost: x\r\nContent-Length : 0\r\n\r\n",
    "GET /health/live HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "GET /health/live HTTP/9.9\r\nHost: x\r\n\r\n",
]
OPENAI = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD_CHUNKS = ["-1\r\n", "0x1\r\nx\r\n", "1 \nx\r\n", "1\r\nxy\r\n", "g\r\n", "\r\n", "f" * 21 + "\r\n"]


@pytest.mark.parametrize("request_", [*AMBIGUOUS, *(f"{CHUNKED}\r\n{one}" for one in BAD_CHUNKS)])
def test_a_request_whose_end_is_ambiguous_is_the_connection_s_last(measuring: str, request_: str) -> None:
    with connected(measuring) as connection:
        connection.sendall(request_.encode() + LIVE)
        said = received(connection)
        assert statuses(said) == [400]
        assert b"connection: close" in said.lower()


def test_such_a_refusal_has_the_format_of_its_path(live: str) -> None:
    for request_, kind in ((OPENAI, dict), (AMBIGUOUS[0], str), ("nonsense\r\n\r\n", str)):
        with connected(live) as connection:
            connection.sendall(request_.encode())
            answer = json.loads(received(connection).partition(b"\r\n\r\n")[2])
        assert isinstance(answer["error"], kind)


@pytest.mark.parametrize(
    ("headers", "begin", "kept"),
    [
        ("Content-Length: 9", b"", True),
        ("Content-Length: 9", b"four", True),
        (f"Content-Length: {DRAINED_BYTES + 1}", b"", False),
        ("Content-Length: 9\r\nExpect: 100-continue", b"", False),
        ("Transfer-Encoding: chunked", b"3\r\n", False),
    ],
)
def test_a_refusal_before_the_body_came(make_app: MakeApp, headers: str, begin: bytes, kept: bool) -> None:
    """The server waits for a small missing rest; if more is missing or the end is ambiguous, it closes."""
    with serving(make_app(api_key="right")) as address, connected(address) as connection:
        connection.sendall(f"POST /generate HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode() + begin)
        said = b""
        while not said.endswith(b"}"):
            said += connection.recv(65536)
        assert status_of(said) == 401
        assert (b"connection: close" not in said.lower()) is kept
        connection.sendall(b"x" * (9 - len(begin)) + LAST)
        assert statuses(received(connection)) == ([200] if kept else [])


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/generate", "", 401),
        ("/generate", "Authorization: Bearer right\r\n", 413),
        ("/" + "a" * 40_000, "", 431),
        ("/a b", "", 400),
    ],
)
def test_a_client_that_sends_its_whole_body_first_receives_the_error(
    make_app: MakeApp, path: str, headers: str, status: int
) -> None:
    body = b"x" * 8_000_000  # more than the socket buffers hold
    app = make_app(api_key="right")
    with serving(app) as address, connected(address) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        reply = received(connection)
        assert status_of(reply) == status
        assert "error" in json.loads(reply.partition(b"\r\n\r\n")[2])


def test_many_requests_in_one_packet_are_answered_in_order(measuring: str) -> None:
    count = 300
    requests = [b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", LIVE] * (count // 2)
    requests[-1] = LAST
    with connected(measuring) as connection:
        connection.sendall(b"".join(requests))
        assert statuses(received(connection)) == [404, 200] * (count // 2)


def test_a_connection_that_fails_does_not_delay_others(measuring: str) -> None:
    """HEAD, whose refusal has no body, after as many requests as are parsed at once."""
    bad = LIVE * 2 + b"HEAD / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"
    with connected(measuring) as connection:
        connection.sendall(bad)
        said = received(connection)
        assert statuses(said) == [200, 200, 400]
        assert said.endswith(b"\r\n\r\n"), "a HEAD's answer has no body"
    with connected(measuring) as connection:
        connection.sendall(LIVE * 9 + LAST)
        assert statuses(received(connection)) == [200] * 10


def test_refusals_are_not_buffered_for_a_paused_reader() -> None:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)

    async def check() -> list[bytes]:
        app: Any = handler
        app.state = SimpleNamespace(early_refusal=EarlyRefusal(Closed(), Settings()))
        written = []
        for paused in (False, True):
            connection, transport = (
                Connection(ServerConfig(app, Settings()), ServerState(), {}),
                SilentTransport(),
            )
            connection.connection_made(transport)
            if paused:
                connection.pause_writing()
            connection.data_received(request_for("/generate", {"inputs": "a"}))
            written.append(transport.written)
            connection.connection_lost(None)
        return written

    refused, waiting = asyncio.run(check())
    assert (statuses(refused), waiting) == ([429], b"")


def test_an_exception_in_one_connection_does_not_stop_others() -> None:
    taken: list[str] = []

    class One:
        def __init__(self, name: str) -> None:
            self.name = name

        def take_turn(self, events: int) -> None:
            taken.append(self.name)
            if self.name == "fails":
                raise RuntimeError("in its turn")

        def abort(self) -> None:
            taken.append("aborted")

    async def check() -> None:
        turns = ParseTurns()
        for name in ("fails", "next"):
            turns.add(One(name))
        await asyncio.sleep(0)
        turns.add(One("later"))
        await asyncio.sleep(0)

    asyncio.run(check())
    assert taken == ["fails", "aborted", "next", "later"]


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_an_upgrade_is_ignored(make_app: MakeApp, upgrade: str, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    with serving(app) as address, connected(address) as connection:
        headers = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AA\r\n"
        connection.sendall(LIVE.replace(b"\r\n\r\n", f"\r\n{headers}\r\n".encode()) + LIVE)
        said = b""
        while said.count(b"}") < 2:
            said += connection.recv(65536)
        assert statuses(said) == [200, 200]
        still_serves(address, app)
    assert not [record for record in caplog.records if "upgrade" in record.getMessage().lower()]
