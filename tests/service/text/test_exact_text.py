"""Exact texts, tokens and log-probabilities over HTTP, from models that generate a given script."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from huggingface_hub import InferenceClient
from starlette.testclient import TestClient

from server.app import create_app
from server.settings.server import Settings
from tests import checkpoints
from tests.conftest import serving, wait_until
from tests.routes.openai.test_openai import chunks
from tests.routes.test_generate import events
from tests.vocabularies import KINDS

PROMPT = "ab"
TEMPLATE = "{{ messages[0].content }}"
Makes = Callable[..., FastAPI]
Says = Callable[..., TestClient]


@pytest.fixture
def make(tmp_path: Path) -> Makes:
    """An app whose model generates these tokens after ``PROMPT``, and then repeats the last one."""

    def make(kind: str, tokens: list[str], **values: Any) -> FastAPI:
        tokenizer = KINDS[kind]()
        tokenizer.chat_template = TEMPLATE
        ids = tokenizer.convert_tokens_to_ids(tokens)
        model = checkpoints.scripted(ids, len(tokenizer(PROMPT)["input_ids"]), len(tokenizer) + 8)
        folder = checkpoints.save(model, tmp_path, tokenizer)
        return create_app(Settings(model_id=str(folder), precisions="fp32", device="cpu", **values))

    return make


@pytest.fixture
def says(make: Makes) -> Iterator[Says]:
    """A client of such an app that is ready."""
    with ExitStack() as stack:

        def says(kind: str, tokens: list[str]) -> TestClient:
            client = stack.enter_context(TestClient(make(kind, tokens), raise_server_exceptions=False))
            wait_until(lambda: client.get("/health").status_code == 200)
            return client

        yield says


def generate(client: TestClient, **parameters: Any) -> Any:
    """The whole response; asserts that the stream has the same text."""
    body = {"inputs": PROMPT, "max_new_tokens": 12, "details": True, **parameters}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    streamed = events(client.post("/generate_stream", json=body).text)
    whole = reply.json()
    assert "".join(one["token"]["text"] for one in streamed) == whole["generated_text"]
    assert streamed[-1]["generated_text"] == whole["generated_text"]
    assert streamed[-1]["details"]["finish_reason"] == whole["details"]["finish_reason"]
    return whole


def complete(client: TestClient, **parameters: Any) -> Any:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 9, **parameters}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def chat(client: TestClient, **parameters: Any) -> Any:
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 9}
    reply = client.post("/v1/chat/completions", json={**body, **parameters})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


@pytest.mark.parametrize(
    ("stop", "text", "generated"),
    [
        ("<|im_end|>", " Hello🤗", 6),
        ("lo🤗<|im_end|>", " Hel", 6),
        ("<|im_end|> wor", " Hello🤗", 7),
        ("🤗 world", " Hello", 7),  # in the decoded text
        ("im_end", " Hello🤗 world world world world world world", 12),  # a part of its name
    ],
)
def test_a_stop_string_that_is_a_special_token(says: Says, stop: str, text: str, generated: int) -> None:
    emoji = ["<0xF0>", "<0x9F>", "<0xA4>", "<0x97>"]
    client = says("llama", ["▁Hello", *emoji, "<|im_end|>", *["▁world"] * 20])
    found = generate(client, stop=[stop])
    reason = "length" if generated == 12 else "stop_sequence"
    assert (found["generated_text"], found["details"]["finish_reason"]) == (text, reason)
    assert found["usage"]["generated_tokens"] == generated
    choice = complete(client, stop=[stop], max_tokens=12)
    assert (choice["text"], choice["finish_reason"] == "stop") == (text, generated < 12)
    choice = chat(client, stop=stop, max_tokens=12)
    assert (choice["message"]["content"], choice["finish_reason"] == "stop") == (text, generated < 12)


def test_the_tokenizers_own_end_token(says: Says) -> None:
    client = says("byte-level", ["a", "b", "<|endoftext|>", *["c"] * 9])  # in neither configuration
    found = generate(client)
    assert (found["generated_text"], found["details"]["finish_reason"]) == ("ab", "eos_token")
    assert generate(client, ignore_eos=True)["generated_text"] == "ab" + "c" * 9


def test_a_space_behind_a_special_token_and_a_split_character(says: Says) -> None:
    emoji = ["▁", "<0xF0>", "<0x9F>", "<0xA4>", "<0x97>"]
    client = says("llama", ["▁Hello", "<|im_end|>", "▁world", *emoji, "</s>"])
    found = generate(client)
    assert found["generated_text"] == " Hello world 🤗"
    tokens = found["details"]["tokens"]
    assert "".join(token["text"] for token in tokens if not token["special"]) == " Hello world 🤗"
    assert [token["text"] for token in tokens if token["special"]] == ["<|im_end|>", "</s>"]
    content = chat(client, logprobs=True, top_logprobs=3)["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == " Hello world 🤗"
    assert bytes(byte for entry in content[3:8] for byte in entry["bytes"]).hex(" ") == "20 f0 9f a4 97"
    assert [entry["token"] for entry in content[3:6]] == [" ", r"\xf0", r"\x9f"]


def test_spaces_that_the_tokenizer_cleans_up(says: Says) -> None:
    words = ["it", "'", "s", "a", "ing", ",", "it", "."]
    client = says("wordpiece-cleaned", [*words, "</s>"])
    found = generate(client)
    assert found["generated_text"] == " it's a ing, it."
    tokens = found["details"]["tokens"]
    assert "".join(token["text"] for token in tokens if not token["special"]) == found["generated_text"]


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_count_characters_from_the_prompts_beginning(says: Says, echo: bool) -> None:
    robot = list("ĠðŁ¤Ĺ")  # " 🤗", byte by byte
    client = says("byte-level", ["a", *robot, "b", *robot, "c"])
    choice = complete(client, echo=echo, max_tokens=13, logprobs=2)
    text = choice["text"]
    assert text == (PROMPT if echo else "") + "a 🤗b 🤗c"
    logprobs = choice["logprobs"]
    offsets, generated = logprobs["text_offset"], [2, 3, 4, 4, 4, 4, 5, 6, 7, 7, 7, 7, 8]
    assert offsets == ([0, 1, *generated] if echo else generated)
    whole = PROMPT + "a 🤗b 🤗c"
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        assert token.startswith("bytes:") or whole[offset] == token
    assert logprobs["tokens"][2 * echo :][2:6] == [rf"bytes:\x{byte:02x}" for byte in "🤗".encode()]
    body = {"prompt": PROMPT, "echo": echo, "max_tokens": 13, "logprobs": 2, "temperature": 0, "stream": True}
    streamed = chunks(client.post("/v1/completions", json=body).text)
    parts = [one["choices"][0]["logprobs"]["text_offset"] for one in streamed]
    assert [offset for part in parts for offset in part] == offsets


def test_alternatives_have_keys_of_their_own(says: Says) -> None:
    """A letter and the byte token of the same letter; parts of characters; ids without a token."""
    client = says("llama", ["a", "<0x61>"])
    size = len(KINDS["llama"]())
    likely = [*KINDS["llama"]().convert_tokens_to_ids(["a", "<0x61>", "<0xF0>"]), size + 1, size + 2]
    bias = {str(id_): 100 for id_ in likely}
    choice = complete(client, logprobs=5, logit_bias=bias, max_tokens=2)
    for token, logprob, top in zip(*(list(choice["logprobs"].values())[:3]), strict=True):
        assert token == "a"
        assert top[token] == logprob == max(top.values())
        assert len(top) == 5


def test_the_sampled_token_is_among_its_alternatives(says: Says) -> None:
    client = says("byte-level", ["a"] * 9)
    sampled = {"temperature": 2, "seed": 5, "logit_bias": {str(id_): 20 for id_ in range(70, 90)}}
    logprobs = complete(client, logprobs=1, **sampled)["logprobs"]
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    for token, logprob, top in zip(*columns, strict=True):
        assert top[token] == logprob
        assert len(top) == 1 + (logprob < max(top.values()))
    assert any(len(top) == 2 for top in logprobs["top_logprobs"])
    content = chat(client, logprobs=True, top_logprobs=1, **sampled)["logprobs"]["content"]
    for entry in content:
        assert entry["token"] in [top["token"] for top in entry["top_logprobs"]]
    assert all(entry["top_logprobs"] == [] for entry in chat(client, logprobs=True)["logprobs"]["content"])


def test_line_ends_inside_of_events(make: Makes) -> None:
    """Clients treat Unicode's line ends as those of the stream."""
    ends = "\u2028\u2029\u0085\v\f\x1c\x1d\x1e\r\n"
    letters = KINDS["byte-level"]().tokenize(f"x{ends}y")
    app = make("byte-level", [*letters, "<|endoftext|>"])
    said = f"x{ends}y"
    with serving(app) as address:
        inference = InferenceClient(address)
        assert "".join(inference.text_generation(PROMPT, max_new_tokens=40, stream=True)) == said
        *_, last = inference.text_generation(PROMPT, max_new_tokens=40, stream=True, details=True)
        assert last.generated_text == said
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = other.completions.create(
            model="tgi", prompt=PROMPT, max_tokens=40, temperature=0, logprobs=2, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == said
        messages: Any = [{"role": "user", "content": PROMPT}]
        for chatting in (inference.chat_completion, other.chat.completions.create):
            deltas: Any = chatting(messages=messages, model="tgi", max_tokens=40, temperature=0, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == said
