"""The OpenAI API: models, completions, chat."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.checkpoints import byte_tokenizer
from tests.conftest import Loads
from tests.routes.test_generate import PROMPT, greedy

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def complete(client: TestClient, **body: Any) -> Any:
    reply = client.post("/v1/completions", json={"model": "fake", "prompt": PROMPT, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def chunks(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    ids = [model["id"] for model in listed]
    assert {"fake", "fake:fp32", "fake:bf16"} <= set(ids)
    for asked, id_ in {"fake:bf16": "fake:bf16", "fake:8bit": "fake:int8", "tgi": "fake"}.items():
        assert client.get(f"/v1/models/{asked}").json()["id"] == id_
    assert client.get("/v1/models/fake:int3").status_code == 404
    missing = client.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_a_completion(client: TestClient) -> None:
    answer = complete(client, temperature=0)
    assert answer["object"] == "text_completion"
    [choice] = answer["choices"]
    assert choice["text"] == greedy(16)
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    count = len(byte_tokenizer()(PROMPT)["input_ids"])
    counts = {"prompt_tokens": count, "completion_tokens": 16, "total_tokens": count + 16}
    assert answer["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["precision"] == "fp32"


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(client: TestClient, ids: bool, stream: bool) -> None:
    texts = [PROMPT, "Another", "Third"]
    prompts: list[Any] = [byte_tokenizer()(text)["input_ids"] for text in texts] if ids else texts
    body = {"model": "fake", "prompt": prompts, "n": 2, "temperature": 0, "max_tokens": 4, "stream": stream}
    reply = client.post("/v1/completions", json=body)
    choices: dict[int, str] = {}
    for answer in chunks(reply.text) if stream else [reply.json()]:
        for choice in answer["choices"]:
            choices[choice["index"]] = choices.get(choice["index"], "") + choice["text"]
    assert choices == {i: greedy(4, texts[i // 2]) for i in range(6)}


def test_token_ids_as_prompt(client: TestClient) -> None:
    ids = byte_tokenizer()(PROMPT)["input_ids"]
    assert complete(client, prompt=ids, temperature=0)["choices"][0]["text"] == greedy(16)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(client: TestClient, stream: bool) -> None:
    body = {"prompt": PROMPT, "echo": True, "max_tokens": 0, "logprobs": 1, "stream": stream}
    reply = client.post("/v1/completions", json=body)
    [answer] = chunks(reply.text) if stream else [reply.json()]
    [choice] = answer["choices"]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    payload = choice["logprobs"]
    assert "".join(payload["tokens"]) == PROMPT
    assert payload["token_logprobs"][0] is None
    assert all(value < 0 for value in payload["token_logprobs"][1:])
    assert payload["top_logprobs"][0] is None
    columns = (payload["tokens"], payload["token_logprobs"], payload["top_logprobs"])
    for token, logprob, top in list(zip(*columns, strict=True))[1:]:
        assert len(top) <= 2
        assert top[token] == logprob == min(top.values())
    texts = payload["tokens"]
    assert payload["text_offset"] == [len("".join(texts[:i])) for i in range(len(texts))]


def test_echo_with_a_continuation(client: TestClient) -> None:
    choice = complete(client, echo=True, max_tokens=3, logprobs=2, temperature=0)["choices"][0]
    assert choice["text"] == PROMPT + greedy(3)
    payload = choice["logprobs"]
    assert "".join(payload["tokens"]) == PROMPT + greedy(3)
    assert {len(payload[key]) for key in payload} == {len(byte_tokenizer()(PROMPT)["input_ids"]) + 3}


def test_a_stream_has_its_usage_on_request(client: TestClient) -> None:
    body = {"prompt": PROMPT, "stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    payload = chunks(client.post("/v1/completions", json=body).text)
    assert "".join(one["choices"][0]["text"] for one in payload[:-1]) == greedy(16)
    assert payload[-2]["choices"][0]["finish_reason"] == "length"
    assert payload[-1]["choices"] == []
    assert payload[-1]["usage"]["completion_tokens"] == 16


def test_a_choice_that_is_stopped_is_computed_no_further(client: TestClient, loads: Loads) -> None:
    other = "Another"
    stop = next(a for a in greedy(5, other) if a not in greedy(200))
    body = {"prompt": [PROMPT, other], "temperature": 0, "max_tokens": 200, "stop": stop}
    loads.runners["fp32"].delay = 0.002  # a busy event loop finds the stop string some steps late
    choices = complete(client, **body)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "stop"]
    batches = loads.runners["fp32"].batches
    assert batches.count(2) < 100 < batches.count(1)


def test_stop_seed_and_bias(client: TestClient) -> None:
    stop = greedy(16)[4:6]
    stopped = complete(client, temperature=0, stop=stop)["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (greedy(16)[:4], "stop")
    assert complete(client, seed=3)["choices"] == complete(client, seed=3)["choices"]
    biased = complete(client, temperature=0, logit_bias={"65": 100}, max_tokens=3)["choices"][0]
    assert biased["text"] == "a" * 3 or biased["text"] == byte_tokenizer().decode([65] * 3)


def test_the_precision_in_the_models_name(client: TestClient) -> None:
    assert complete(client, model="fake:bf16")["precision"] == "bf16"
    assert complete(client, precision="bf16")["precision"] == "bf16"
    path = client.post("/models/fake:bf16/v1/completions", json={"prompt": PROMPT})
    assert path.json()["precision"] == "bf16"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": []}, {"prompt": [[]]}, {"prompt": ["a", [1]]}, {"prompt": [1, "a"]},
        {"prompt": None}, {"prompt": [-1]}, {"prompt": [320]}, {"prompt": [True]},
        {"prompt": ["a"] * 300_000},
        {"n": 10**7}, {"n": 0}, {"best_of": 10**7}, {"best_of": 1, "n": 2}, {"max_tokens": 0},
        {"max_tokens": -1}, {"logprobs": 6}, {"logprobs": True}, {"temperature": -1}, {"temperature": 3},
        {"top_p": 1.1}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"320": 1}}, {"logit_bias": {"1": 101}},
        {"precision": "int3"}, {"model": "fake:int3"}, {"suffix": "x"}, {"unheard_of": 1},
        {"stop": ["a"] * 100_000}, {"prompt": "\ud800"}, {"prompt": ["\ud800"]}, {"user": 5},
    ],
)  # fmt: skip
def test_bad_requests(client: TestClient, body: dict[str, Any]) -> None:
    sent = json.dumps({"model": "fake", "prompt": PROMPT, **body})
    reply = client.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    payload = reply.json()["error"]
    assert payload["type"] == "invalid_request_error"
    assert set(payload) == {"message", "type", "param", "code"}
    assert len(reply.content) < 1000


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "x" * 400}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 300}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 10**9}, "max_tokens", "context_length_exceeded"),
        ({"prompt": [320]}, "prompt", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"n": 3, "best_of": 2}, "best_of", None),
        ({"logit_bias": {"1": 1, "320": 1}}, "logit_bias", None),
        ({"logit_bias": {"1": "x"}}, "logit_bias", None),
        ({"logit_bias": [1]}, "logit_bias", None),
        ({"model": "fake:int3"}, "precision", None),
    ],
)
def test_an_error_names_its_field_as_this_dialect_does(
    client: TestClient, body: dict[str, Any], param: str, code: str | None
) -> None:
    reply = client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert reply.status_code == 400
    payload = reply.json()["error"]
    assert (payload["param"], payload["code"]) == (param, code)


def test_chat_needs_a_template(client: TestClient) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "chat template" in reply.json()["error"]["message"]


@pytest.fixture
def chatty(make_chatty: Callable[..., TestClient]) -> TestClient:
    """A client of a model that has a chat template."""
    return make_chatty(max_concurrent_requests=2)


def test_a_conversation_is_not_rendered_before_there_is_a_place(
    chatty: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = chatty.app
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 3}
    with monkeypatch.context() as patch:
        patch.setattr(app.state.default.chat, "render", pytest.fail)
        assert chatty.post("/v1/chat/completions", json=body).status_code == 429


def test_a_conversation_that_the_context_does_not_hold(chatty: TestClient) -> None:
    payload = chatty.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 400}]})
    assert (payload.status_code, payload.json()["error"]["param"]) == (400, "messages")
    assert payload.json()["error"]["code"] == "context_length_exceeded"


def test_contents_in_parts(chatty: TestClient) -> None:
    def asked(content: Any) -> Any:
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 4}
        return chatty.post("/v1/chat/completions", json=body)

    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert asked(parts).json()["choices"][0]["message"]["content"] == greedy(4, "user: Hi\nassistant:")
    picture = {"type": "image_url", "image_url": {"url": "https://a.example"}}
    for wrong in ([picture], ["Hi"], [{"type": "text"}], {"type": "text", "text": "Hi"}, 5):
        assert asked(wrong).status_code == 400


def test_chat(chatty: TestClient) -> None:
    client = chatty
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 4}
    expected = greedy(4, "user: Hi\nassistant:")
    answer = client.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 1}).json()
    assert answer["choices"][0]["message"]["content"] == expected
    assert len(answer["choices"][0]["logprobs"]["content"]) == 4
    payload = chunks(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in payload) == expected
    assert payload[-1]["choices"][0]["finish_reason"] == "length"
