"""``/tokenize``."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.text import TokenSpan
from tests.conftest import at_rest, entered, until
from tests.test_generate import PROMPT


def test_tokenize(client: TestClient) -> None:
    told = client.post("/tokenize", json={"inputs": PROMPT}).json()
    assert "".join(token["text"] for token in told) == PROMPT
    assert [token["start"] for token in told[1:]] == [token["stop"] for token in told[:-1]]
    assert all(set(token) == {"id", "text", "start", "stop"} for token in told)
    assert client.post("/tokenize", json={"inputs": ""}).status_code == 422


def test_characters_of_several_bytes(client: TestClient) -> None:
    text = 'é😀"\n'
    told = client.post("/tokenize", json={"inputs": text}).json()
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in told)


def test_a_long_text_keeps_nobody_waiting_and_takes_a_place(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly(text: str) -> Iterator[TokenSpan]:
        begun.set()
        assert go.wait(10)
        yield TokenSpan(1, text, 0, len(text))

    async def main() -> None:
        async with entered(app) as client:
            with monkeypatch.context() as patch:
                patch.setattr(app.state.codec, "tokenize", slowly)
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
