"""Requests refused below the framework get the same responses as those refused within it."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import h11
import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from server.app import ROUTES
from server.errors import NotReady, Overloaded, ServiceError, Unauthorized
from server.http.admission.admission_control import AdmissionControl
from server.http.admission.promised_places import Promise
from server.http.admission.refusal_log import LINES_PER_SECOND, RefusalLog
from server.http.connection.early_refusal import EarlyRefusal, Refusal
from server.http.middleware import RequestContext
from server.http.redaction import Redaction
from server.http.route_facts import RouteTable
from server.settings.server import Settings
from tests.conftest import PATIENCE, Loads, serving, until, wait_until
from tests.http.connection.test_slow_clients import connected, received, request_for, status_of
from tests.http.test_overload import Gate
from tests.routes.test_generate import PROMPT, greedy

MakeApp = Callable[..., FastAPI]
BODY = {"inputs": PROMPT, "max_new_tokens": 5}
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
KEY, BEARER = "Authorization: Bearer secret", {"authorization": "Bearer secret"}


@contextmanager
def full(app: FastAPI, loads: Loads) -> Iterator[str]:
    """The address of a server whose only place is taken throughout."""
    with serving(app) as address:
        gate = Gate(loads.runners["fp32"])
        held: list[httpx.Response] = []
        ask = partial(httpx.post, f"{address}/generate", json=BODY, headers=BEARER, timeout=PATIENCE)
        client = threading.Thread(target=lambda: held.append(ask()))
        client.start()
        try:
            wait_until(lambda: app.state.service.places.in_flight == 1)
            yield address
        finally:
            gate.opened.set()
            client.join()
        assert held[0].json()["generated_text"] == greedy(5)


@contextmanager
def kept(address: str) -> Iterator[socket.socket]:
    """A connection that has served a request, and is therefore past the accept."""
    with connected(address) as connection:
        connection.sendall(LIVE)
        assert status_of(answer(connection)[0]) == 200
        yield connection


def answer(connection: socket.socket) -> tuple[bytes, Any]:
    """Head and JSON body of the next response."""
    said = b""
    while b"\r\n\r\n" not in said:
        part = connection.recv(1)
        assert part, said
        said += part
    length = int(said.lower().split(b"content-length: ")[1].split()[0])
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return said, json.loads(body)


@pytest.mark.parametrize("path", ["/generate", "/", "/generate_stream?x=1", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize("is_kept", [True, False])
def test_a_refusal_never_reaches_the_framework(
    make_app: MakeApp, loads: Loads, monkeypatch: pytest.MonkeyPatch, path: str, is_kept: bool
) -> None:
    app = make_app(max_concurrent_requests=1)
    request = request_for(path, BODY, "X-Request-ID: mine", "Connection: keep-alive")
    with full(app, loads) as address, (kept if is_kept else connected)(address) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(RequestContext, "__call__", pytest.fail)
            connection.sendall(request)
            head, body = answer(connection)
        headers = {line.split(b": ")[0]: line.split(b": ")[1] for line in head.split(b"\r\n")[1:-2]}
        assert status_of(head) == 429
        assert (headers[b"x-request-id"], headers[b"content-type"]) == (b"mine", b"application/json")
        assert 1 <= int(headers[b"retry-after"]) <= 60
        assert b"date" in headers
        if path.startswith("/v1"):
            assert body["error"]["type"] == "rate_limit_error"
            assert body["error"]["code"] == "overloaded"
        else:
            assert (body["error_type"], body["request_id"]) == ("overloaded", "mine")
        if is_kept:
            connection.sendall(LIVE)
            assert status_of(answer(connection)[0]) == 200
        elif b"connection" in headers:  # the request arrived before its connection was accepted
            assert headers[b"connection"] == b"close"
            assert received(connection) == b""
        counted = httpx.get(f"{address}/metrics", timeout=PATIENCE).text
        of_a_generation = 'outcome="overloaded",precision="unread"} 1.0' in counted
        assert of_a_generation == (path != "/tokenize")


@pytest.mark.parametrize("is_kept", [True, False])
def test_keys_and_sizes_are_checked_before_places(make_app: MakeApp, loads: Loads, is_kept: bool) -> None:
    app = make_app(max_concurrent_requests=1, api_key="secret", payload_limit=1000)
    large = {"inputs": "x" * 2000}
    with full(app, loads) as address:
        for body, headers, status in (
            (BODY, [KEY], 429),
            (BODY, [], 401),
            (BODY, ["Authorization: Bearer wrong"], 401),
            (BODY, [KEY, KEY], 401),
            (large, [KEY], 413),
            (large, [], 401),
        ):
            with connected(address) as connection:
                if is_kept and body is BODY:
                    connection.sendall(LIVE)
                    answer(connection)
                connection.sendall(request_for("/generate", body, *headers))
                head, payload = answer(connection)
            assert status_of(head) == status
            assert (b"www-authenticate: Bearer".lower() in head.lower()) == (status == 401)
            assert payload["request_id"].encode() in head
        counted = httpx.get(f"{address}/metrics", headers=BEARER, timeout=PATIENCE).text
        assert 'outcome="overloaded",precision="unread"} 1.0' in counted


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n", 429),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n", 429),
        (b"POST /%67enerate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n", 429),
        (b"POST /generate HTTP/1.0\r\nContent-Length: 2\r\n", 429),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close, foo\r\n", 429),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nContent-Length: 2\r\n", 400),
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n", 404),
    ],
)
def test_a_head_that_is_not_plain_is_parsed_by_h11(
    make_app: MakeApp, loads: Loads, head: bytes, status: int
) -> None:
    with full(make_app(max_concurrent_requests=1), loads) as address, connected(address) as connection:
        connection.sendall(head + b"\r\n{}")
        assert status_of(answer(connection)[0]) == status


def test_a_web_page_is_refused_with_the_headers_that_it_needs(make_app: MakeApp, loads: Loads) -> None:
    app = make_app(max_concurrent_requests=1, cors_allow_origin="https://a.example")
    with full(app, loads) as address:
        headers = {"Origin": "https://a.example"}
        refused = httpx.post(f"{address}/generate", json=BODY, headers=headers, timeout=PATIENCE)
        assert refused.status_code == 429
        assert refused.headers["access-control-allow-origin"] == "https://a.example"


def test_the_body_of_a_refused_request_is_skipped(make_app: MakeApp, loads: Loads) -> None:
    """Whatever its content and segmentation, the next request on the connection is parsed correctly."""
    inner = request_for("/generate", BODY)
    body = inner * 2000
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with full(make_app(max_concurrent_requests=1), loads) as address, kept(address) as connection:
        for parts in ((head, body), (head + body[:1], body[1:-1], body[-1:]), (head + body,)):
            for part in parts:
                connection.sendall(part)
            assert status_of(answer(connection)[0]) == 429
            connection.sendall(LIVE)
            assert status_of(answer(connection)[0]) == 200
        connection.sendall(inner + inner + LIVE)  # all at once
        assert [status_of(answer(connection)[0]) for _ in range(3)] == [429, 429, 200]
        connection.sendall(request_for("/generate", BODY, "Connection: close")[:-1])
        assert status_of(answer(connection)[0]) == 429
        connection.sendall(b"}")
        assert received(connection) == b""


def test_a_body_that_never_comes_does_not_keep_its_connection(make_app: MakeApp, loads: Loads) -> None:
    app = make_app(max_concurrent_requests=1, receive_timeout=0.3)
    with full(app, loads) as address, kept(address) as connection:
        connection.sendall(request_for("/generate", BODY)[:-1])
        assert status_of(answer(connection)[0]) == 429
        assert received(connection) == b""


def test_while_draining_the_answer_is_503(make_app: MakeApp, loads: Loads) -> None:
    app = make_app()
    with serving(app) as address, kept(address) as connection:
        app.state.lifecycle.drain()
        for one in (connection, None):
            with kept(address) if one is None else connected(address) as other:
                (one or other).sendall(request_for("/v1/completions", BODY))
                head, body = answer(one or other)
                assert status_of(head) == 503
                assert b"\r\nretry-after: " in head
                assert body["error"]["message"] == "the server is shutting down"


def test_refusals_are_logged_some_lines_a_second(caplog: pytest.LogCaptureFixture) -> None:
    scope = {"method": "POST", "path": "/generate\n", "state": {"request_id": "id"}}

    async def main() -> None:
        log = RefusalLog(Redaction(()))
        for number in range(LINES_PER_SECOND + 7):
            error: ServiceError = Unauthorized("who?") if number == 15 else Overloaded("full")
            log.add(scope, error, error.status, 0.001)
        await until(lambda: len(caplog.records) > LINES_PER_SECOND + 1)
        log.add(scope, NotReady("not yet"), 503, 0.001)

    with caplog.at_level(logging.INFO, "server.access"):
        asyncio.run(main())
    said = [record.getMessage() for record in caplog.records]
    assert (
        said[:LINES_PER_SECOND] == [r'id POST "/generate\n" 429 1.0 ms (overloaded: full)'] * LINES_PER_SECOND
    )
    assert said[LINES_PER_SECOND:] == [
        "1 more requests were answered 401 within a second",
        "6 more requests were answered 429 within a second",
        r'id POST "/generate\n" 503 1.0 ms (unavailable: not yet)',
    ]


class Closed(AdmissionControl):
    """Refuses everything."""

    def __init__(self) -> None:
        self.routes = RouteTable(ROUTES)

    def judge(self, scope: Any, body_bytes: int, is_whole: bool) -> ServiceError | Promise | None:
        self.scope = scope
        return Overloaded("full")


_names = st.sampled_from(
    ["Host", "content-length", "Connection", "X-A", "Authorization", "X\u0130", "", "a b"]
)
_values = st.one_of(
    st.sampled_from(["x", "0", "5", "+5", "5, 5", "keep-alive", "close", "Bearer k", ""]),
    st.text(st.characters(max_codepoint=255), max_size=5),
)
_lines = st.lists(st.tuples(_names, st.sampled_from([":", ": ", " : ", ":\t"]), _values), max_size=5)


@given(
    st.sampled_from(["/generate", "/", "/generate?a=b&c", "generate", "/a b", "/\xe9", "*"]),
    _lines,
    st.sampled_from(["\r\n", "\n"]),
)
def test_plain_heads_are_parsed_as_by_h11(target: str, lines: list[tuple[str, str, str]], end: str) -> None:
    head = f"POST {target} HTTP/1.1{end}Host: x{end}" + "".join("".join(line) + end for line in lines) + end
    data = head.encode("latin-1", "replace")
    admission = Closed()

    async def main() -> Refusal | Promise | None:
        return EarlyRefusal(admission, Settings(device="cpu")).judge(data)

    if (refusal := asyncio.run(main())) is None:
        return
    assert isinstance(refusal, Refusal)
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    path, _, query = request.target.partition(b"?")
    assert (admission.scope["path"].encode(), admission.scope["query_string"]) == (path, query)
    assert admission.scope["headers"] == list(request.headers)
    length = dict(request.headers).get(b"content-length", b"0")
    assert (refusal.head_bytes, refusal.body_bytes) == (len(data), int(length))
    assert connection.trailing_data[0] == b""


@pytest.mark.parametrize(
    "headers",
    [
        [f"Content-Length: {'0' * 18}5"],  # nineteen digits: five bytes, or none if a parser reads eighteen
        ["a: b"] * 300,
        [f"X-Large: {'a' * 40_000}"],
    ],
)
def test_an_ambiguous_or_too_large_head_is_not_plain(headers: list[str]) -> None:
    lines = ["POST /generate HTTP/1.1", "Host: x", *headers, "", ""]
    judge = EarlyRefusal(Closed(), Settings(device="cpu")).judge
    assert judge("\r\n".join(lines).encode()) is None


def test_the_next_request_after_a_padded_length_is_the_clients_own(make_app: MakeApp, loads: Loads) -> None:
    """Bytes that one parser reads as the refused request's body must not be a request to another."""
    smuggled = LIVE
    head = (
        "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    )
    request = head.format(f"{len(smuggled):019}").encode() + smuggled
    with full(make_app(max_concurrent_requests=1), loads) as address, kept(address) as connection:
        connection.sendall(request + LIVE.replace(b"Host", b"Connection: close\r\nHost"))
        said = received(connection)
    assert [int(part.split()[0]) for part in said.split(b"HTTP/1.1 ")[1:]] in ([429, 200], [429])


def test_a_kept_connection_outlives_the_clock_of_a_refused_request(make_app: MakeApp, loads: Loads) -> None:
    with (
        full(make_app(max_concurrent_requests=1, receive_timeout=0.5), loads) as address,
        kept(address) as connection,
    ):
        connection.sendall(request_for("/generate", BODY))
        assert status_of(answer(connection)[0]) == 429
        time.sleep(0.7)
        connection.sendall(LIVE)
        assert status_of(answer(connection)[0]) == 200
