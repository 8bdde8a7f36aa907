"""Long prompts: refused by length; encoded a few at a time, within the deadline, unless disconnected."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server.service.text.encoding_threads import EncodingThreads
from tests.conftest import PATIENCE, at_rest, entered, until
from tests.routes.test_places import TEMPLATE, Client

MakeApp = Callable[..., FastAPI]
FAR_TOO_LONG = "the cat sat, " * 150_000
LONG = "x " * 2500  # more than is encoded on the event loop


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": FAR_TOO_LONG}),
        ("/generate_stream", {"inputs": FAR_TOO_LONG}),
        ("/v1/completions", {"prompt": FAR_TOO_LONG}),
        ("/v1/completions", {"prompt": ["a", FAR_TOO_LONG], "n": 2}),
        ("/v1/completions", {"prompt": FAR_TOO_LONG, "echo": True, "max_tokens": 0}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": FAR_TOO_LONG}]}),
        ("/compare", {"inputs": FAR_TOO_LONG}),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_unencoded(
    make_app: MakeApp, tmp_path: Path, path: str, body: Any
) -> None:
    encoded: list[int] = []
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)

    async def main() -> None:
        async with entered(app) as client:
            codec = app.state.default.codec
            encode = codec.encode
            codec.encode = Noted(encode, encoded)
            reply = await client.post(path, json=body)
            error = reply.json()["error"]
            if path.startswith("/v1"):
                assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
                assert error["param"] == ("messages" if "chat" in path else "prompt")
                error = error["message"]
            else:
                assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
            assert "maximum context length is 256 tokens" in error
            assert "at least 150000 tokens" in error  # the longest token has 13 characters
            assert max(encoded, default=0) <= 1
            await at_rest(app, client)

    app = make_app(chat_template=template)
    asyncio.run(main())


def test_of_a_far_longer_text_than_truncate_keeps_its_end_is_encoded(make_app: MakeApp) -> None:
    encoded: list[int] = []
    text = "".join(f"the {number} others, " for number in range(20_000))
    body = {"inputs": text, "truncate": 30, "max_new_tokens": 1, "decoder_input_details": True}

    async def main() -> None:
        async with entered(app) as client:
            codec = app.state.default.codec
            encode = codec.encode
            codec.encode = Noted(encode, encoded)
            reply = (await client.post("/generate", json=body)).json()
            shown = [token["id"] for token in reply["details"]["prefill"]]
            assert shown == encode(text)[-30:]
            assert max(encoded) < 10_000

    app = make_app()
    asyncio.run(main())


class Noted:
    """An ``encode`` that records the length of every text."""

    def __init__(self, encode: Callable[..., list[int]], lengths: list[int]) -> None:
        self._encode, self._lengths = encode, lengths

    def __call__(self, text: str, *rest: Any) -> list[int]:
        self._lengths.append(len(text))
        return self._encode(text, *rest)


class Gate:
    """Replaces a codec's ``encode``: long texts wait until the gate is opened."""

    def __init__(self, app: FastAPI) -> None:
        self.opened = threading.Event()
        self.begun = 0
        self._encode = app.state.default.codec.encode
        app.state.default.codec.encode = self
        app.state.default.codec.token_length = None  # of a tokenizer without a known bound

    def __call__(self, text: str, *rest: Any) -> list[int]:
        if len(text) < 1000:
            found: list[int] = self._encode(text, *rest)
            return found
        self.begun += 1
        assert self.opened.wait(PATIENCE)
        return [65, 66]


def test_two_texts_are_encoded_at_a_time_and_none_of_disconnected_clients(make_app: MakeApp) -> None:
    async def main() -> None:
        async with entered(app) as client:
            gate, service = Gate(app), app.state.service
            asked = {"inputs": LONG, "max_new_tokens": 2}
            staying = [asyncio.create_task(client.post("/generate", json=asked)) for _ in range(2)]
            await until(lambda: gate.begun == 2)
            leaving = [
                Client(app, "/generate", asked),
                Client(app, "/v1/completions", {"prompt": [LONG] * 3}),
            ]
            await until(lambda: service.places.in_flight == 6)
            short = await client.post("/generate", json={"inputs": "abc", "max_new_tokens": 2})
            assert short.status_code == 200
            for one in leaving:
                one.leave()
            await until(lambda: service.places.in_flight == 2)
            gate.opened.set()
            for reply in await asyncio.gather(*staying):
                usage = reply.json()["usage"]
                assert (usage["prompt_tokens"], usage["generated_tokens"]) == (2, 2)
            await client.post("/generate", json=asked)
            assert gate.begun == 3
            await at_rest(app, client)

    app = make_app()
    asyncio.run(main())


def test_the_deadline_covers_encoding(make_app: MakeApp) -> None:
    async def main() -> None:
        async with entered(app) as client:
            gate = Gate(app)
            asked = [client.post("/generate", json={"inputs": LONG}) for _ in range(2)]
            asked += [client.post("/v1/completions", json={"prompt": LONG})]
            asked += [client.post("/tokenize", json={"inputs": "abc"})]
            app.state.default.codec.tokenize = lambda text: gate.opened.wait(PATIENCE) or iter(())
            replies = await asyncio.gather(*asked)
            assert [reply.status_code for reply in replies] == [504] * 4
            assert replies[0].json()["error_type"] == "timeout"
            gate.opened.set()
            await at_rest(app, client)
            assert gate.begun == 2

    app = make_app(request_timeout=0.4)
    asyncio.run(main())


def test_a_prompt_with_several_continuations_is_encoded_once(make_app: MakeApp) -> None:
    async def main() -> None:
        async with entered(app) as client:
            gate = Gate(app)
            gate.opened.set()
            body = {"prompt": [LONG, LONG + "x"], "n": 2, "best_of": 4, "max_tokens": 2}
            reply = (await client.post("/v1/completions", json=body)).json()
            assert len(reply["choices"]) == 4
            assert gate.begun == 2

    app = make_app()
    asyncio.run(main())


def test_shutdown_does_not_wait_for_encoding() -> None:
    begun, never = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        never.wait(60)

    async def main() -> None:
        threads = EncodingThreads()
        waiting = asyncio.ensure_future(threads.run(wait))
        await until(begun.is_set)
        waiting.cancel()
        threads.close()

    asyncio.run(main())
    assert not never.is_set()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("encoding"))
    never.set()


def test_a_base_exception_reaches_its_request() -> None:
    class Panic(BaseException):
        pass

    def panic() -> None:
        raise Panic

    async def main() -> None:
        threads = EncodingThreads()
        with pytest.raises(Panic):
            await threads.run(panic)
        assert await threads.run(lambda: json.loads("1")) == 1
        threads.close()

    asyncio.run(main())
