"""``/tokenize``."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.service.text.codec import TokenSpan
from tests.conftest import PATIENCE, at_rest, entered, serving, until, wait_until
from tests.http.connection.test_slow_clients import connected, request_for, still_serves
from tests.routes.test_generate import PROMPT
from tests.routes.test_places import Client

TEXT = "".join(f"the {number} others, é\n" for number in range(6000))


def test_tokenize(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"inputs": PROMPT}).json()
    assert "".join(token["text"] for token in answer) == PROMPT
    assert [token["start"] for token in answer[1:]] == [token["stop"] for token in answer[:-1]]
    assert all(set(token) == {"id", "text", "start", "stop"} for token in answer)
    assert client.post("/tokenize", json={"inputs": ""}).status_code == 422


def test_characters_of_several_bytes(client: TestClient) -> None:
    text = 'é😀"\n'
    answer = client.post("/tokenize", json={"inputs": text}).json()
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in answer)


def test_a_long_text_delays_no_request_and_takes_a_place(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly(text: str) -> Iterator[TokenSpan]:
        begun.set()
        assert go.wait(PATIENCE)
        yield TokenSpan(1, text, 0, len(text))

    async def main() -> None:
        async with entered(app) as client:
            with monkeypatch.context() as patch:
                patch.setattr(app.state.default.codec, "tokenize", slowly)
                asked = asyncio.create_task(client.post("/tokenize", json={"inputs": PROMPT}))
                await until(begun.is_set)
                assert (await client.get("/health")).status_code == 200
                over = await client.post("/tokenize", json={"inputs": PROMPT})
                assert (over.status_code, int(over.headers["retry-after"]) >= 1) == (429, True)
                go.set()
                assert (await asked).json() == [{"id": 1, "text": PROMPT, "start": 0, "stop": len(PROMPT)}]
            await at_rest(app, client)

    app = make_app(max_concurrent_requests=1)
    asyncio.run(main())


def test_a_long_response_is_sent_in_chunks_and_is_complete(client: TestClient) -> None:
    reply = client.post("/tokenize", json={"inputs": TEXT})
    assert "content-length" not in reply.headers
    assert reply.headers["content-type"] == "application/json"
    answer = reply.json()
    assert len(answer) > 10_000
    start, stop = answer[4999]["stop"], answer[5001]["start"]
    expected = {"id": answer[5000]["id"], "start": start, "stop": stop, "text": TEXT[start:stop]}
    assert answer[5000] == expected
    assert answer[-1]["stop"] == len(TEXT)
    short = client.post("/tokenize", json={"inputs": PROMPT})
    assert int(short.headers["content-length"]) == len(short.content)


def test_a_text_too_long_is_refused_untokenized(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = client.app
    monkeypatch.setattr(app.state.default.codec, "tokenize", lambda text: iter(()))
    assert client.post("/tokenize", json={"inputs": "x" * 250_000}).json() == []
    monkeypatch.setattr(app.state.default.codec, "tokenize", pytest.fail)
    reply = client.post("/tokenize", json={"inputs": "x" * 250_001})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert "250001 characters; at most 250000 are accepted" in reply.json()["error"]


def test_a_client_that_leaves_while_its_text_is_tokenized(make_app: Callable[..., FastAPI]) -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly(text: str) -> Iterator[TokenSpan]:
        begun.set()
        assert go.wait(PATIENCE)
        yield TokenSpan(1, text, 0, len(text))

    async def main() -> None:
        async with entered(app) as client:
            tokenize, app.state.default.codec.tokenize = app.state.default.codec.tokenize, slowly
            leaving = Client(app, "/tokenize", {"inputs": PROMPT})
            await until(begun.is_set)
            assert app.state.service.places.in_flight == 1
            leaving.leave()
            await until(lambda: app.state.service.places.in_flight == 0)  # the thread is still running
            go.set()
            app.state.default.codec.tokenize = tokenize
            await at_rest(app, client)

    app = make_app()
    asyncio.run(main())


def test_a_place_is_held_until_the_answer_is_sent_or_its_reader_leaves(
    make_app: Callable[..., FastAPI],
) -> None:
    app = make_app()
    with serving(app, send_buffer=4096) as address, connected(address, 4096) as slow:
        slow.sendall(request_for("/tokenize", {"inputs": TEXT}))
        slow.recv(1000)
        for _ in range(20):
            assert app.state.service.places.in_flight == 1
            slow.recv(1000)
        slow.close()
        wait_until(lambda: app.state.service.places.in_flight == 0)
        still_serves(address, app)


def test_an_endlessly_slow_reader_is_cut_off(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(request_timeout=2, receive_timeout=0.6)
    with serving(app, send_buffer=4096) as address, connected(address, 4096) as slow:
        slow.sendall(request_for("/tokenize", {"inputs": TEXT[:40_000]}))
        said = slow.recv(512)
        assert b"200" in said
        try:
            while part := slow.recv(512):
                said += part
                time.sleep(0.02)  # each pause is shorter than the receive timeout
        except ConnectionResetError:
            pass
        assert not said.endswith(b"0\r\n\r\n")  # the last chunk
        wait_until(lambda: app.state.service.places.in_flight == 0)
        still_serves(address, app)
