"""Clients that send or read slowly, on a real socket: they are cut off, and others are not affected."""

import json
import logging
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from server.http.connection.framing import HEAD_BYTES
from tests.conftest import PATIENCE, Loads, serving, wait_until
from tests.routes.test_generate import PROMPT, greedy

MakeApp = Callable[..., FastAPI]
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
TOO_MUCH = HEAD_BYTES + 8192


@contextmanager
def connected(address: str, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    where = urlsplit(address)
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE)
        connection.connect((where.hostname, where.port))
        yield connection


def received(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def trickle(connection: socket.socket, parts: Iterator[bytes]) -> bytes:
    """Sends part by part, slowly, until the server closes the connection; returns its response."""
    end = time.monotonic() + PATIENCE
    said = b""
    for part in parts:
        assert time.monotonic() < end, "it was never cut off"
        try:
            connection.sendall(part)
            heard = connection.recv(65536) if select.select([connection], [], [], 0.05)[0] else None
        except (BrokenPipeError, ConnectionResetError):
            break
        if heard == b"":
            break
        said += heard or b""
    return said


def status_of(reply: bytes) -> int:
    return int(reply.split()[1])


def still_serves(address: str, app: FastAPI) -> None:
    reply = httpx.post(f"{address}/generate", json={"inputs": PROMPT, "max_new_tokens": 3}, timeout=PATIENCE)
    assert reply.json()["generated_text"] == greedy(3)
    assert app.state.service.places.in_flight == 0


@pytest.mark.parametrize(
    ("at_once", "slowly"), [(b"", repeat(b"G")), (HEAD, repeat(b"X-Slow: 1\r\n")), (HEAD, repeat(b"x"))]
)
def test_a_head_that_trickles_in(make_app: MakeApp, at_once: bytes, slowly: Iterator[bytes]) -> None:
    app = make_app(receive_timeout=0.4)
    with serving(app) as address, connected(address) as connection:
        connection.sendall(at_once)
        reply = trickle(connection, slowly)
        assert status_of(reply) == 408
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error_type"] == "timeout"
        still_serves(address, app)


def test_a_body_that_trickles_in_and_goes_on_after_the_answer(make_app: MakeApp) -> None:
    app = make_app(receive_timeout=0.4)
    with serving(app) as address, connected(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        assert status_of(trickle(connection, repeat(b"x"))) == 408
        still_serves(address, app)


def test_a_second_request_that_trickles_in(make_app: MakeApp) -> None:
    app = make_app(receive_timeout=0.4)
    with serving(app) as address, connected(address) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\n")
        reply = trickle(connection, repeat(b"X-Slow: 1\r\n"))
        assert [int(part.split()[0]) for part in reply.split(b"HTTP/1.1 ")[1:]] == [200, 408]


def test_a_silent_connection_is_closed_without_a_response(make_app: MakeApp) -> None:
    with serving(make_app(receive_timeout=0.3)) as address, connected(address) as connection:
        assert received(connection) == b""


def test_an_idle_connection_is_kept_for_the_keep_alive_time(make_app: MakeApp) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    app = make_app(receive_timeout=0.4)
    with serving(app, timeout_keep_alive=2) as address, connected(address) as connection:
        for pause in (0, 0.8):
            time.sleep(pause)  # longer than a head may take to arrive
            connection.sendall(request)
            said = b""
            while not said.endswith(b"}"):
                said += connection.recv(65536)
            assert status_of(said) == 200
        assert received(connection) == b""


def test_a_slow_answer_is_not_cut(make_app: MakeApp, loads: Loads) -> None:
    loads.prepare = lambda runner: setattr(runner, "delay", 0.02)
    with serving(make_app(receive_timeout=0.4)) as address:
        body = {"inputs": PROMPT, "max_new_tokens": 40}
        reply = httpx.post(f"{address}/generate", json=body, timeout=PATIENCE)
        assert reply.json()["generated_text"] == greedy(40)
        stream = httpx.post(f"{address}/generate_stream", json=body, timeout=PATIENCE).text
        assert json.loads(stream.strip().rpartition("data: ")[2])["generated_text"] == greedy(40)


def test_a_reader_that_stops_is_cut_off_and_its_batch_continues(make_app: MakeApp, loads: Loads) -> None:
    loads.prepare = lambda runner: setattr(runner, "delay", 0.01)
    app = make_app(receive_timeout=0.5)
    with serving(app, send_buffer=4096) as address, connected(address, 4096) as stopped:
        runner = loads.runners["fp32"]
        longest = 0

        def watch(slots: Any) -> None:
            nonlocal longest
            longest = max([longest, *(len(ids) for ids in runner.held.values() if ids[0] == first)])

        first = app.state.default.codec.encode("z")[0]
        runner.on_decode = watch
        body = {"inputs": "z", "max_new_tokens": 250, "top_n_tokens": 5, "ignore_eos": True}
        stopped.sendall(request_for("/generate_stream", body))
        wait_until(lambda: runner.held)
        mate = httpx.post(
            f"{address}/generate", json={"inputs": PROMPT, "max_new_tokens": 200}, timeout=PATIENCE
        )
        assert mate.json()["generated_text"] == greedy(200)
        wait_until(lambda: app.state.service.places.in_flight == 0 and not runner.held)
        assert longest < 250, "it was computed to its end after the client had left"
        still_serves(address, app)


def request_for(path: str, body: Any = None, *headers: str) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: x", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


@pytest.mark.parametrize("headers", [[], ["Connection: close"]])
def test_an_unread_response_does_not_hold_its_connection(make_app: MakeApp, headers: list[str]) -> None:
    body = {"prompt": ["a"] * 100, "max_tokens": 5, "logprobs": 5}
    app = make_app(receive_timeout=0.4)
    with serving(app, send_buffer=4096) as address, connected(address, 4096) as stopped:
        stopped.sendall(request_for("/v1/completions", body, *headers))
        stopped.recv(1, socket.MSG_PEEK)  # the answer has begun
        wait_until(lambda: app.state.service.places.in_flight == 0)  # it was cut off
        head, _, content = received(stopped).partition(b"\r\n\r\n")
        declared = int(head.lower().split(b"content-length: ")[1].split()[0])
        assert len(content) < declared
        still_serves(address, app)


def test_a_large_answer_holds_a_place_until_it_is_read(make_app: MakeApp) -> None:
    body = {"prompt": ["a"] * 100, "max_tokens": 5, "logprobs": 5}
    app = make_app()
    with serving(app, send_buffer=4096) as address, connected(address, 4096) as stopped:
        stopped.sendall(request_for("/v1/completions", body))
        stopped.recv(1, socket.MSG_PEEK)  # the answer has begun: all is computed
        assert app.state.pool.state("fp32").engine.running == 0
        assert app.state.service.places.in_flight == 1
        stopped.close()
        wait_until(lambda: app.state.service.places.in_flight == 0)
        still_serves(address, app)


def test_a_slow_reader_that_goes_on_reading_gets_it_all(make_app: MakeApp) -> None:
    body = {"prompt": ["a"] * 60, "max_tokens": 5, "logprobs": 5, "temperature": 0}
    app = make_app(receive_timeout=0.4)
    with serving(app, send_buffer=4096) as address, connected(address, 4096) as slow:
        slow.sendall(request_for("/v1/completions", body, "Connection: close"))
        parts = []
        while part := slow.recv(4096):
            parts.append(part)
            time.sleep(0.03)
        assert len(json.loads(b"".join(parts).partition(b"\r\n\r\n")[2])["choices"]) == 60


@pytest.mark.parametrize(
    "headers", [[b"X-Large: " + b"a" * TOO_MUCH], [b"X-Many: 1"] * (TOO_MUCH // 9), [b"a:"] * 300, []]
)
def test_a_head_too_large(make_app: MakeApp, headers: list[bytes]) -> None:
    app = make_app()
    target = b"/health" if headers else b"a" * TOO_MUCH
    with serving(app) as address, connected(address) as connection:
        connection.sendall(b"\r\n".join([b"GET %b HTTP/1.1" % target, b"Host: x", *headers, b"", b""]))
        head, _, body = received(connection).partition(b"\r\n\r\n")
        assert status_of(head) == 431
        assert json.loads(body)["error_type"] == "validation"
        still_serves(address, app)


@pytest.mark.parametrize("bytes_", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"nonsense\r\n\r\n"])
def test_invalid_http_is_a_400(live: str, bytes_: bytes) -> None:
    with connected(live) as connection:
        connection.sendall(bytes_ + b"\r\n\r\n")
        head, _, body = received(connection).partition(b"\r\n\r\n")
        assert status_of(head) == 400
        answer = json.loads(body)
        assert answer["error_type"] == "validation"
        assert answer["request_id"].encode() in head


@pytest.mark.parametrize(
    ("path", "status"), [("/generate", 400), ("/v1/completions", 400), ("/nothing", 404)]
)
def test_an_invalid_chunk(
    make_app: MakeApp, path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    with serving(app) as address, connected(address) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"5\r\nab")
        select.select([connection], [], [], 0.1 if status == 400 else 10)  # the latter answers at once
        connection.sendall(b"cde\r\nno chunk\r\n")
        said, _, body = received(connection).partition(b"\r\n\r\n")
        assert status_of(said) == status
        assert isinstance(json.loads(body)["error"], dict if path.startswith("/v1") else str)
        still_serves(address, app)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_forwarded_addresses_and_upgrades_change_nothing(make_app: MakeApp) -> None:
    app = make_app()

    @app.get("/who")
    def who(request: Request) -> JSONResponse:
        return JSONResponse([request.client and request.client.host, request.url.scheme])

    forged = {"X-Forwarded-For": "9.9.9.9", "X-Forwarded-Proto": "https"}
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    with serving(app) as address:
        told = httpx.get(f"{address}/who", headers=forged | upgrade, timeout=PATIENCE)
        assert told.json() == ["127.0.0.1", "http"]
