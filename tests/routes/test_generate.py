"""The API of Text Generation Inference: requests and responses of /generate and its stream."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.checkpoints import byte_tokenizer
from tests.conftest import Loads
from tests.fakes import FakeRunner

PROMPT = "Once upon a time"


def greedy(count: int, prompt: str = PROMPT) -> str:
    tokenizer = byte_tokenizer()
    text: str = tokenizer.decode(FakeRunner().expected(tokenizer(prompt)["input_ids"], count))
    return text


def events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


def ask(client: TestClient, **body: Any) -> Any:
    reply = client.post("/generate", json={"inputs": PROMPT, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_plain_request(client: TestClient) -> None:
    reply = client.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 5}})
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["generated_text"] == greedy(5)
    assert answer["precision"] == reply.headers["x-precision"] == "fp32"
    assert answer["details"] is None
    assert answer["usage"]["generated_tokens"] == 5
    assert answer["usage"]["prompt_tokens"] == int(reply.headers["x-prompt-tokens"])
    assert set(answer["timings"]) == {"queue_ms", "prefill_ms", "decode_ms", "total_ms", "tokens_per_second"}
    for name in ("generated-tokens", "total-time", "queue-time", "inference-time"):
        assert int(reply.headers[f"x-{name}"]) >= 0
    assert reply.headers["x-request-id"]


def test_prompt_and_top_level_parameters(client: TestClient) -> None:
    reply = client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 3})
    assert reply.json()["generated_text"] == greedy(3)


def test_the_bare_address_answers_with_a_list(client: TestClient) -> None:
    reply = client.post("/", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 2}})
    assert [one["generated_text"] for one in reply.json()] == [greedy(2)]


def test_full_text(client: TestClient) -> None:
    answer = ask(client, max_new_tokens=3, return_full_text=True)
    assert answer["generated_text"] == PROMPT + greedy(3)


def test_details(client: TestClient) -> None:
    answer = ask(client, max_new_tokens=4, details=True, decoder_input_details=True, top_n_tokens=2, seed=9)
    details = answer["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 4
    assert details["seed"] == 9
    assert [token["text"] for token in details["prefill"]] == [
        byte_tokenizer().decode([id_]) for id_ in byte_tokenizer()(PROMPT)["input_ids"]
    ]
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in details["prefill"][1:])
    assert "".join(token["text"] for token in details["tokens"]) == greedy(4)
    assert all(token["logprob"] < 0 and token["special"] is False for token in details["tokens"])
    tops = [tops[0]["id"] for tops in details["top_tokens"]]
    assert tops == [token["id"] for token in details["tokens"]]


def test_stop_strings_end_the_text_and_are_not_shown(client: TestClient) -> None:
    stop = greedy(8)[3:5]
    answer = ask(client, max_new_tokens=8, stop=[stop], details=True)
    assert answer["generated_text"] == greedy(8)[:3]
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_no_stop_string_where_none_is_allowed(make_client: Callable[..., TestClient]) -> None:
    client = make_client(max_stop_sequences=0)
    for stop in ("a", ["a"]):
        assert client.post("/generate", json={"inputs": PROMPT, "stop": stop}).status_code == 422
    assert ask(client, max_new_tokens=2, stop=[])["generated_text"] == greedy(2)


def test_a_seed_repeats_a_sample_and_a_drawn_seed_is_reported(client: TestClient) -> None:
    first = ask(client, max_new_tokens=12, temperature=5.0, details=True)
    seed = first["details"]["seed"]
    again = ask(client, max_new_tokens=12, temperature=5.0, seed=seed)
    assert again["generated_text"] == first["generated_text"]


@pytest.mark.parametrize("penalty", [1e-320, 1e-300, 1e300])
def test_an_extreme_repetition_penalty_leaves_a_distribution(client: TestClient, penalty: float) -> None:
    wish = {"repetition_penalty": penalty, "do_sample": True, "seed": 1, "details": True, "ignore_eos": True}
    assert ask(client, max_new_tokens=30, **wish)["details"]["finish_reason"] == "length"


def test_best_of_returns_the_likeliest_first(client: TestClient) -> None:
    details = ask(client, max_new_tokens=4, temperature=5.0, best_of=3, details=True, seed=1)["details"]
    assert len(details["best_of_sequences"]) == 2
    mean = [
        sum(token["logprob"] for token in one["tokens"]) for one in (details, *details["best_of_sequences"])
    ]
    assert mean == sorted(mean, reverse=True)


@pytest.mark.parametrize("path", ["/generate_stream", "/generate", "/"])
def test_a_stream(client: TestClient, path: str) -> None:
    body = {"inputs": PROMPT, "stream": True, "parameters": {"max_new_tokens": 5}}
    reply = client.post(path, json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    streamed = events(reply.text)
    assert [one["index"] for one in streamed] == [1, 2, 3, 4, 5]
    assert "".join(one["token"]["text"] for one in streamed) == greedy(5) == streamed[-1]["generated_text"]
    assert all(one["token"]["logprob"] < 0 for one in streamed)
    assert all(one["generated_text"] is None and one["details"] is None for one in streamed[:-1])
    details = streamed[-1]["details"]
    assert details["finish_reason"] == "length"
    assert details["input_length"] == int(reply.headers["x-prompt-tokens"])
    assert streamed[-1]["precision"] == "fp32"
    assert streamed[-1]["timings"]["total_ms"] >= 0


def test_a_fault_in_a_stream_is_its_last_event(client: TestClient, loads: Loads) -> None:
    def fail(slots: object) -> None:
        raise RuntimeError("secret detail")

    loads.runners["fp32"].on_decode = fail
    reply = client.post("/generate_stream", json={"inputs": PROMPT, "max_new_tokens": 5})
    streamed = events(reply.text)
    assert streamed[-1]["error_type"] == "generation"
    assert "generated_text" not in streamed[-1]
    assert "secret" not in reply.text


def test_a_fault_is_a_424_and_the_next_request_is_served(client: TestClient, loads: Loads) -> None:
    def fail(slot: int, ids: object) -> None:
        raise RuntimeError("secret detail")

    runner = loads.runners["fp32"]
    before, runner.on_prefill = runner.on_prefill, fail
    reply = client.post("/generate", json={"inputs": PROMPT})
    assert reply.status_code == 424
    assert reply.json()["error_type"] == "generation"
    assert "secret" not in reply.text
    runner.on_prefill = before
    assert ask(client, max_new_tokens=2)["generated_text"] == greedy(2)


@pytest.mark.parametrize(
    ("path", "headers", "extra"),
    [
        ("/generate", {}, {"precision": "bf16"}),
        ("/generate", {}, {"parameters": {"precision": "bf16"}}),
        ("/generate", {"X-Precision": "bf16"}, {}),
        ("/generate?precision=bf16", {}, {}),
        ("/models/fake:bf16/generate", {}, {}),
        ("/generate?precision=bf16", {"X-Precision": "bf16"}, {"precision": "bf16"}),
    ],
)
def test_where_a_precision_may_be_named(
    client: TestClient, path: str, headers: dict[str, str], extra: dict[str, Any]
) -> None:
    reply = client.post(path, json={"inputs": PROMPT, "max_new_tokens": 2, **extra}, headers=headers)
    if "parameters" in extra:
        reply = client.post(path, json={"inputs": PROMPT, **extra}, headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.json()["precision"] == reply.headers["x-precision"] == "bf16"
    assert reply.json()["precision_requested"] == "bf16"


def test_precisions_that_disagree(client: TestClient) -> None:
    reply = client.post("/generate?precision=fp32", json={"inputs": PROMPT}, headers={"X-Precision": "bf16"})
    assert reply.status_code == 422


@pytest.mark.parametrize("precision", ["int3", "FP32 ", None, [], {}, 8, True])
def test_unknown_precisions(client: TestClient, precision: object) -> None:
    reply = client.post("/generate", json={"inputs": PROMPT, "precision": precision})
    assert reply.status_code == 422
    assert reply.json()["error_type"] == "validation"


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": value} for value in (0, -1, 10**9, 1.5, "5", True, 10**30)
    ] + [{"temperature": value} for value in (0, -1, 1e308, "1", True)]
    + [{"top_p": value} for value in (0, 1, 1.1)] + [{"typical_p": 1}, {"min_p": 1}, {"top_k": -5}]
    + [{"seed": value} for value in (-1, 2**64)] + [{"stop": [""]}, {"stop": ["a"] * 5}, {"stop": "a" * 257}]
    + [{"best_of": 10**7}, {"best_of": 2}, {"best_of": 5, "do_sample": True}]
    + [{"truncate": 0}, {"truncate": 257}, {"top_n_tokens": 6}, {"repetition_penalty": 0}]
    + [{"frequency_penalty": 2.1}]
    + [{"watermark": True}, {"grammar": {"type": "json"}}, {"adapter_id": "x"}, {"tools": [1]}]
    + [{"unheard_of": 1}, {"details": "yes"}],
)  # fmt: skip
def test_bad_parameters_are_named(client: TestClient, parameters: dict[str, Any]) -> None:
    reply = client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    assert reply.status_code == 422
    payload = reply.json()
    assert payload["error_type"] == "validation"
    assert next(iter(parameters)) in payload["error"]
    assert payload["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("parameters", [{"top_k": 10**30}, {"temperature": 1e-45}, {"top_p": 1e-300}])
def test_extreme_but_allowed(client: TestClient, parameters: dict[str, Any]) -> None:
    assert ask(client, max_new_tokens=2, **parameters)["usage"]["generated_tokens"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": ""},
        {},
        {"inputs": PROMPT, "prompt": PROMPT},
        {"inputs": 5},
        {"inputs": "\ud800"},
        {"inputs": PROMPT, "seed": 1, "parameters": {"seed": 1}},
        {"inputs": PROMPT, "parameters": 5},
        {"inputs": PROMPT, "parameters": []},
        {"inputs": PROMPT, "parameters": ""},
        {"inputs": PROMPT, "parameters": False},
        {"inputs": PROMPT, "parameters": {"stream": True}},
        {"inputs": PROMPT, "stream": True, "do_sample": True, "best_of": 2},
        {"inputs": PROMPT, "stream": True, "decoder_input_details": True},
        {"inputs": PROMPT, "\ud800": 1},
    ],
)
def test_bad_bodies(client: TestClient, body: dict[str, Any]) -> None:
    reply = client.post("/generate", content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == 422
    assert PROMPT not in reply.text


def test_the_error_for_a_long_prompt_has_both_counts(client: TestClient) -> None:
    reply = client.post("/generate", json={"inputs": "x" * 400})
    assert reply.status_code == 422
    assert "400" in reply.json()["error"]
    assert "255" in reply.json()["error"]
    cut = client.post("/generate", json={"inputs": "x" * 400, "truncate": 10, "max_new_tokens": 1})
    assert cut.json()["usage"]["prompt_tokens"] == 10


@pytest.mark.parametrize("name", ["other", "../etc/passwd", "http://x/y", "fake@other"])
def test_other_models_are_not_here(client: TestClient, name: str) -> None:
    reply = client.post("/v1/completions", json={"model": name, "prompt": PROMPT})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"


def test_capacity_is_answered_with_429(make_client: Callable[..., TestClient]) -> None:
    client = make_client(max_concurrent_requests=2)
    reply = client.post("/generate", json={"inputs": PROMPT, "do_sample": True, "best_of": 3})
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert ask(client, max_new_tokens=2)["generated_text"] == greedy(2)
