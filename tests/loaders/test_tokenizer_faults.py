"""A tokenizer that raises or panics: an error of one request, or one line of a command."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

import loaders.checkpoint
from server.__main__ import main
from server.service.generation import GenerationRequest
from server.service.text.codec import TextCodec
from server.service.text.prompt_encoder import PromptEncoder
from tests import checkpoints
from tests.chat_templates import SMOLLM
from tests.checkpoints import EXPLOSIVE, exploding_tokenizer
from tests.conftest import Loads, wait_until
from tests.http.test_http_robustness import still_serves
from tests.routes.test_generate import PROMPT, greedy

FAILS = "the model's tokenizer fails on this text"


def panic() -> BaseException:
    """A real panic, whose class can't be imported."""
    with pytest.raises(BaseException, match="retry-limit") as caught:
        exploding_tokenizer()(EXPLOSIVE)
    assert not isinstance(caught.value, Exception)
    return caught.value


@pytest.fixture
def client(
    make_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> TestClient:
    monkeypatch.setattr(loaders.checkpoint, "load_tokenizer", lambda _: exploding_tokenizer())
    monkeypatch.setattr("server.service.text.codec._LONG", 1000)  # so that a long one fits the context
    file = tmp_path / "template.jinja"
    file.write_text(SMOLLM)
    return make_client(chat_template=file)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/generate", {"inputs": EXPLOSIVE}, 422),
        ("/generate", {"inputs": EXPLOSIVE * 40}, 422),  # in a thread, being long
        ("/generate_stream", {"inputs": EXPLOSIVE}, 422),
        ("/tokenize", {"inputs": EXPLOSIVE}, 422),
        ("/compare", {"inputs": EXPLOSIVE}, 422),
        ("/v1/completions", {"prompt": ["a", EXPLOSIVE]}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": EXPLOSIVE}]}, 400),
    ],
    ids=["generate", "long", "stream", "tokenize", "compare", "completions", "chat"],
)
def test_a_text_that_fails_in_the_tokenizer_is_one_requests_error(
    client: TestClient, path: str, body: dict[str, Any], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["message"] if path.startswith("/v1") else error) == FAILS
    assert "xxx" not in caplog.text
    app: Any = client.app
    assert app.state.service.places.in_flight == 0
    still_serves(client)


def test_tokens_that_the_tokenizer_fails_to_decode(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = client.app
    codec, fault, last = app.state.default.codec, panic(), greedy(5)[-1]
    decode = codec.vocabulary._decode

    def fails(ids: list[int]) -> str:
        if last in (text := decode(ids)):
            raise fault
        return str(text)

    monkeypatch.setattr(codec.vocabulary, "_decode", fails)
    body = {"inputs": PROMPT, "max_new_tokens": 8}
    reply = client.post("/generate", json=body)
    assert (reply.status_code, reply.json()["error_type"]) == (424, "generation")
    stream = client.post("/generate_stream", json=body)
    assert '"error":"the model\'s tokenizer fails to decode these tokens"' in stream.text
    tail = client.post("/v1/completions", json={"prompt": codec.encode(last), "max_tokens": 1})
    assert tail.status_code == 500
    assert tail.json()["error"]["message"] == "the model's tokenizer fails to decode these tokens"
    monkeypatch.undo()
    wait_until(lambda: app.state.service.places.in_flight == 0)
    wait_until(lambda: not any(engine.model.runner.held for engine in app.state.pool.engines))
    still_serves(client)


def test_a_base_exception_is_answered_in_json(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app: Any = client.app
    fault = panic()

    def fails(*_: object) -> None:
        raise fault

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "server"):
        patch.setattr(app.state.pool, "states", fails)
        reply = client.get("/precisions")
    assert (reply.status_code, reply.json()["error"]) == (500, "internal error")
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    assert "an unforeseen fault" in caplog.text
    still_serves(client)


def test_a_load_that_panics_has_failed(
    make_client: Callable[..., TestClient], loads: Loads, caplog: pytest.LogCaptureFixture
) -> None:
    client, fault = make_client(), panic()

    def fails(*_: object) -> None:
        raise fault

    loads.prepare = fails
    reply = client.post("/generate", json={"inputs": PROMPT, "precision": "fp16"})
    assert (reply.status_code, reply.json()["error_type"]) == (503, "unavailable")
    assert reply.json()["error"] == "fp16 could not be loaded: RuntimeError"
    assert type(fault).__name__ in caplog.text
    still_serves(client)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("models") / "tiny")
    exploding_tokenizer().save_pretrained(made)
    return str(made)


def test_commands_report_it_in_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "words.txt"
    text.write_text("the other " * 100 + EXPLOSIVE)
    quality = ["quality", "--precisions", "fp32", "--text", str(text)]
    for command, message in (
        (["generate", EXPLOSIVE], FAILS),
        (quality, "the model's tokenizer fails on words.txt (after 999 bytes)"),
    ):
        assert main([*command, "--model", folder]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"bitdial {command[0]}: {message}"


def test_a_tokenizer_that_panics_at_once_is_not_usable(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = panic()

    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", fails)
    assert main(["serve", "--model", folder]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "bitdial serve: tiny has no usable tokenizer"


def test_an_exponential_pattern_blocks_the_event_loop_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the library's limit nothing interrupts it; later texts are encoded in a thread."""
    monkeypatch.setattr("server.service.text.codec._SLOW", 0.001)
    slow = "x" * 22 + "z"
    turns: list[int] = []

    async def check() -> None:
        prompts = PromptEncoder(TextCodec(exploding_tokenizer()), 1000, 400, 400)
        for _ in range(2):
            ticking = asyncio.create_task(tick())
            await prompts.encode(GenerationRequest(slow), time.perf_counter() + 60)
            ticking.cancel()
        prompts.close()

    async def tick() -> None:
        turns.append(0)
        while True:
            turns[-1] += 1
            await asyncio.sleep(0)

    asyncio.run(check())
    (while_encoding,) = turns  # the first never had its turn
    assert while_encoding > 10
