"""Further fields of OpenAI's and vLLM's clients: applied, ignored if they have no effect, or refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.bench.gpu.models import END
from tests.checkpoints import byte_tokenizer
from tests.conftest import PATIENCE, Loads, serving
from tests.routes.openai.test_openai import chunks, complete
from tests.routes.test_generate import PROMPT, greedy

SAID = [{"role": "user", "content": "Hi"}]
ANSWER = "user: Hi\nassistant:"


@pytest.fixture
def chatty(make_chatty: Callable[..., TestClient]) -> TestClient:
    """A client of a model that has a chat template."""
    return make_chatty()


def chat(client: TestClient, **body: Any) -> Any:
    sent = {"messages": SAID, "temperature": 0, "max_tokens": 4, **body}
    reply = client.post("/v1/chat/completions", json=sent)
    assert reply.status_code == 200, reply.text
    return reply.json()


def said(client: TestClient, **body: Any) -> str:
    text: str = chat(client, **body)["choices"][0]["message"]["content"]
    return text


# defaults that clients send although they have no effect

BOTH: dict[str, list[Any]] = {
    "user": ["me"], "metadata": [{"run": "7"}], "store": [True, False], "service_tier": ["auto", "default"],
    "safety_identifier": ["x"], "prompt_cache_key": ["x"], "cache_salt": ["x"], "priority": [0],
    "use_beam_search": [False], "early_stopping": [False], "length_penalty": [1, 1.0], "bad_words": [[]],
    "response_format": [{"type": "text"}], "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True], "include_stop_str_in_output": [False],
    "truncation_side": ["left"], "top_k": [-1, 0], "top_p": [1, 1.0], "min_p": [0, 0.0], "min_tokens": [0],
    "repetition_penalty": [1, 1.0], "stop": [[]], "stop_token_ids": [[]], "logit_bias": [{}], "n": [1],
    "stream_options": [{}, {"include_usage": True, "continuous_usage_stats": True}], "seed": [-1, -5],
    "return_token_ids": [False], "vllm_xargs": [{}],
}  # fmt: skip
IN_COMPLETIONS: dict[str, list[Any]] = {"suffix": [""], "add_special_tokens": [True], "best_of": [1]}
IN_CHATS: dict[str, list[Any]] = {
    "tools": [[]], "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False], "functions": [[]],
    "function_call": ["none"], "reasoning_effort": ["none"], "modalities": [["text"]], "best_of": [1],
    "echo": [False], "add_special_tokens": [False], "add_generation_prompt": [True],
    "continue_final_message": [False], "chat_template_kwargs": [{}], "documents": [[]],
    "logprobs": [False], "top_logprobs": [0],
}  # fmt: skip
NULLS = ["temperature", "audio", "prediction", "guided_json", "structured_outputs", "allowed_token_ids"]


def every(*tables: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A body for every value, and one of nulls for every name."""
    merged = {name: values for table in tables for name, values in table.items()}
    return [{name: value} for name, values in merged.items() for value in [*values, None]]


def test_a_completion_accepts_fields_without_effect(client: TestClient) -> None:
    for body in every(BOTH, IN_COMPLETIONS):
        answer = complete(client, **{"temperature": 0, "max_tokens": 4, **body})
        assert answer["choices"][0]["text"] == greedy(4), body


def test_a_chat_accepts_fields_without_effect(chatty: TestClient) -> None:
    for body in every(BOTH, IN_CHATS):
        assert said(chatty, **body) == greedy(4, ANSWER), body
    chat(chatty, **dict.fromkeys(NULLS))


WRONG: list[dict[str, Any]] = [
    {"use_beam_search": True}, {"use_beam_search": 0}, {"priority": 1}, {"priority": False},
    {"response_format": {"type": "json_object"}}, {"guided_choice": ["a"]}, {"allowed_token_ids": [1]},
    {"bad_words": ["x"]}, {"skip_special_tokens": False}, {"include_stop_str_in_output": True},
    {"truncation_side": "right"}, {"service_tier": "flex"}, {"metadata": "x"}, {"store": "yes"},
    {"length_penalty": "1"}, {"prompt_logprobs": 1}, {"return_token_ids": True}, {"top_k": -2},
    {"top_k": 1.5}, {"min_p": 1.1}, {"repetition_penalty": 0}, {"min_tokens": -1}, {"min_tokens": 5},
    {"stop_token_ids": [320]}, {"stop_token_ids": [-1]}, {"stop_token_ids": [1] * 100_000},
    {"stop_token_ids": 5}, {"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": 257},
    {"top_p": -0.1}, {"seed": 2**64}, {"seed": -(2**63) - 1}, {"stream_options": {"unheard_of": 1}},
    {"seed": 1.5}, {"best_of": True},
]  # fmt: skip
WRONG_IN_CHATS: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tool_choice": "required"},
    {"functions": [{"name": "f"}]}, {"reasoning_effort": "high"}, {"modalities": ["text", "audio"]},
    {"echo": True}, {"add_generation_prompt": False}, {"continue_final_message": True},
    {"chat_template": "{{ messages }}"}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"top_logprobs": 21},
]  # fmt: skip


def check_refused(client: TestClient, path: str, body: dict[str, Any], wrong: dict[str, Any]) -> None:
    reply = client.post(path, json={**body, **wrong})
    assert reply.status_code == 400, (wrong, reply.text)
    error = reply.json()["error"]
    [name] = wrong
    assert error["param"].split(".")[0] == name, wrong
    assert name in error["message"], error
    assert len(reply.content) < 400


def test_a_field_with_an_effect_is_refused_by_name(chatty: TestClient) -> None:
    for wrong in WRONG:
        plain = {"prompt": PROMPT, "max_tokens": 4}
        check_refused(chatty, "/v1/completions", plain, wrong)
    for wrong in [*WRONG, *WRONG_IN_CHATS]:
        check_refused(chatty, "/v1/chat/completions", {"messages": SAID, "max_tokens": 4}, wrong)


# vLLM's fields that are applied


def test_sampling_filters(client: TestClient) -> None:
    flat = {"temperature": 2, "max_tokens": 8, "seed": 5}  # where the model's top token has 3 % of the mass
    free = complete(client, **flat)["choices"][0]["text"]
    assert free != greedy(8)
    for narrow in ({"top_k": 1}, {"min_p": 1}, {"top_p": 0}, {"temperature": 0}):
        assert complete(client, **{**flat, **narrow})["choices"][0]["text"] == greedy(8), narrow


def test_a_repetition_penalty(client: TestClient, loads: Loads) -> None:
    letters = greedy(12)
    assert len(set(letters)) < 12
    loads.runners["fp32"].poison = lambda logits, slots: logits - 10  # it multiplies negative logits
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    assert complete(client, **body)["choices"][0]["text"] == letters
    assert complete(client, **body, repetition_penalty=9)["choices"][0]["text"] != letters


def test_a_token_that_ends_the_text(client: TestClient) -> None:
    letter = next(one for one in greedy(8)[2:] if one not in greedy(2))
    [stop] = byte_tokenizer()(letter)["input_ids"]
    for more in ({}, {"ignore_eos": True}):
        answer = complete(client, temperature=0, max_tokens=8, stop_token_ids=[stop], logprobs=0, **more)
        [choice] = answer["choices"]
        assert choice["text"] == greedy(8).split(letter)[0]
        assert choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(choice["text"]) + 1
        assert choice["logprobs"]["tokens"][-1] == letter


def test_the_fewest_tokens(client: TestClient, loads: Loads) -> None:
    """Neither the model's end token nor a stop token of the request comes before them."""
    end, other = 0, 70

    def ends(logits: Any, slots: Any) -> Any:
        logits[:, end], logits[:, other] = 20.0, 15.0
        return logits

    loads.runners["fp32"].poison = ends
    body = {"temperature": 0, "max_tokens": 6}
    assert complete(client, **body)["usage"]["completion_tokens"] == 1
    answer = complete(client, **body, min_tokens=4)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (5, "stop")
    answer = complete(client, **body, min_tokens=4, stop_token_ids=[other])
    assert answer["usage"]["completion_tokens"] == 5
    assert byte_tokenizer().decode([other]) not in answer["choices"][0]["text"]
    assert complete(client, **body, min_tokens=6)["choices"][0]["finish_reason"] == "length"


def test_the_prompts_last_tokens(client: TestClient) -> None:
    answer = complete(
        client, temperature=0, max_tokens=4, prompt="xyz" * 200 + "abc", truncate_prompt_tokens=3
    )
    assert answer["choices"][0]["text"] == greedy(4, "abc")
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_usage_so_far_in_every_chunk(chatty: TestClient, path: str) -> None:
    text = PROMPT if path == "/v1/completions" else ANSWER
    prompt = len(byte_tokenizer()(text)["input_ids"])
    body: dict[str, Any] = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": SAID}
    options = {"include_usage": True, "continuous_usage_stats": True}
    sent = {**body, "stream": True, "temperature": 0, "max_tokens": 3, "ignore_eos": True}
    *earlier, last = chunks(chatty.post(path, json={**sent, "stream_options": options}).text)
    counts = [one["usage"]["completion_tokens"] for one in earlier]
    assert sorted(counts) == counts
    assert set(counts) - {0} == {1, 2, 3}
    assert all(one["usage"]["prompt_tokens"] == prompt for one in earlier)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], prompt + 3)
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}):
        plain = chunks(chatty.post(path, json={**sent, "stream_options": options}).text)
        assert [one for one in plain if one["choices"] and "usage" in one] == []


# prompts and messages


@pytest.mark.parametrize("prompt", ["", [""], ["", PROMPT]])
def test_an_empty_prompt_is_the_token_that_documents_begin_with(client: TestClient, prompt: Any) -> None:
    answer = complete(client, prompt=prompt, temperature=0, max_tokens=4, echo=True)
    assert answer["choices"][0]["text"] == greedy(4, END)
    more = len(byte_tokenizer()(PROMPT)["input_ids"]) if PROMPT in prompt else 0
    assert answer["usage"]["prompt_tokens"] == 1 + more


def test_an_empty_prompt_where_there_is_no_such_token(client: TestClient) -> None:
    app: Any = client.app
    app.state.default.codec._tokenizer.bos_token = app.state.default.codec._tokenizer.eos_token = None
    error = client.post("/v1/completions", json={"prompt": ""}).json()["error"]
    assert (error["param"], error["message"]) == ("prompt", "the input has no tokens")


def test_turns_without_a_text(chatty: TestClient) -> None:
    expected = greedy(4, "user: Hi\nassistant: \nuser: \nassistant:")
    silences: list[dict[str, Any]] = [{"content": None}, {}, {"content": ""}, {"content": []}]
    for silent in silences:
        turns = [*SAID, {"role": "assistant", "name": "x", **silent}, {"role": "user", "content": ""}]
        assert said(chatty, messages=turns) == expected
    cached = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    assert said(chatty, messages=[{"role": "user", "content": [cached]}]) == greedy(4, ANSWER)
    for role in ("user", "system"):
        reply = chatty.post("/v1/chat/completions", json={"messages": [{"role": role, "content": None}]})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages.0.content")


# errors


def refusal(client: TestClient, path: str, **body: Any) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == 400
    return reply.json()["error"]


CONTEXT = "This model's maximum context length is 256 tokens"
"""The text that litellm matches; LangChain: "prompt is too long"."""


def test_the_context_is_exceeded_in_the_usual_words(chatty: TestClient) -> None:
    completions, chats = "/v1/completions", "/v1/chat/completions"
    long, turns = "x" * 250, [{"role": "user", "content": "x" * 230}]  # 247 tokens with the template
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        (completions, {"prompt": "x" * 300}, "prompt", "your prompt resulted in 300 tokens"),
        (completions, {"prompt": long}, "prompt", "266 tokens (250 in the prompt, 16 in the completion)"),
        (completions, {"prompt": long, "max_tokens": 7}, "max_tokens", "(250 in the prompt, 7 by max_tokens"),
        (chats, {"messages": [*turns, *turns]}, "messages", "your messages resulted in "),
        (chats, {"messages": SAID, "max_tokens": 300}, "max_tokens", "300 by max_tokens"),
        (chats, {"messages": SAID, "max_completion_tokens": 300}, "max_completion_tokens",
         "300 by max_completion_tokens"),
    ]  # fmt: skip
    for path, body, param, words in cases:
        error = refusal(chatty, path, **body)
        assert error["message"].startswith(CONTEXT), error
        assert words in error["message"], error
        assert "prompt is too long" in error["message"], error
        assert (error["param"], error["code"]) == (param, "context_length_exceeded"), error
    native = chatty.post("/generate", json={"inputs": long, "max_new_tokens": 7})
    assert (native.status_code, native.json()["error"]) == (
        422,
        f"{CONTEXT}. However, you requested 257 tokens (250 in the prompt, 7 by max_new_tokens): "
        "the prompt is too long",
    )


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/nothing", "/v1/", "/models/fake/v1/rerank"])
def test_an_unknown_route_is_no_unknown_model(client: TestClient, path: str) -> None:
    reply = client.post(path, json={})
    assert reply.status_code == 404
    error = reply.json()["error"]
    fields = {"type": "invalid_request_error", "param": None, "code": None}
    assert error == {"message": error["message"], **fields}
    assert "route" in error["message"]


# names of the model


def test_names_that_mean_the_served_model(client: TestClient) -> None:
    here = "http://testserver"
    for name in (
        "tgi",
        "[UNUSED]",
        "dummy",
        here,
        f"{here}/v1",
        f"{here}/v1/completions",
        "HTTP://TESTSERVER/",
    ):
        assert complete(client, model=name, temperature=0, max_tokens=2)["choices"][0]["text"] == greedy(2)
    assert complete(client, model="[UNUSED]:bf16")["precision"] == "bf16"
    for name in (
        "http://elsewhere",
        "http://testserver.example/v1",
        "https://",
        "http://[",
        "ftp://testserver",
    ):
        reply = client.post("/v1/completions", json={"model": name, "prompt": PROMPT})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found"), name


# limits that are settings


def test_the_number_of_stop_strings_is_limited_by_the_setting(make_chatty: Callable[..., TestClient]) -> None:
    client = make_chatty(max_stop_sequences=100)
    assert client.get("/info").json()["max_stop_sequences"] == 100
    stops = [f"never {i}" for i in range(101)]
    bodies: dict[str, dict[str, Any]] = {
        "/generate": {"inputs": PROMPT, "max_new_tokens": 2},
        "/compare": {"inputs": PROMPT, "max_new_tokens": 2},
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 2},
        "/v1/chat/completions": {"messages": SAID, "max_tokens": 2},
    }
    for path, body in bodies.items():
        assert client.post(path, json={**body, "stop": stops[:100]}).status_code == 200, path
        assert "at most 100 stop strings" in client.post(path, json={**body, "stop": stops}).text
        described = json.dumps(client.get("/openapi.json").json()["paths"][path])
        assert '"maxItems": 100' in described


def test_a_drawn_seed_can_be_sent_back_by_javascript(client: TestClient) -> None:
    body = {"inputs": PROMPT, "max_new_tokens": 1, "details": True, "do_sample": True}
    for _ in range(20):
        assert client.post("/generate", json=body).json()["details"]["seed"] <= 2**53 - 1


def test_a_real_socket_s_own_address(make_client: Callable[..., TestClient], make_app: Any) -> None:
    import httpx

    with serving(make_app()) as address:
        body = {"model": f"{address}/v1", "prompt": PROMPT, "temperature": 0, "max_tokens": 2}
        reply = httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE)
        assert reply.json()["choices"][0]["text"] == greedy(2)
