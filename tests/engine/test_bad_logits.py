"""NaN and infinite logits while a prompt is scored: an error of that request, never a figure."""

import math
from collections.abc import Callable

import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.engine.faults import BadLogits
from server.engine.logprobs import prompt_logprobs
from server.engine.sampler import Sampler
from server.engine.sequence import MIN_LOGPROB, SamplingParams, Sequence, Token
from tests.checkpoints import byte_tokenizer
from tests.conftest import Loads
from tests.routes.test_generate import PROMPT, events

ROW = {"NaN": [math.nan, 1.0], "+inf": [math.inf, 1.0], "all -inf": [-math.inf, -math.inf]}
SCORING = {
    "/generate": {"inputs": PROMPT, "decoder_input_details": True, "max_new_tokens": 2},
    "/v1/completions": {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0},
    "/compare": {"inputs": PROMPT, "precisions": ["fp32"], "max_new_tokens": 2},
}


def poisoned(loads: Loads, row: list[float]) -> None:
    """Breaks a row in the middle of the prompt; the last row, from which a token is sampled, stays intact."""

    def poison(logits: torch.Tensor, slots: object) -> torch.Tensor:
        if len(logits) > 2:
            logits[1] = row[1]
            logits[1, 7] = row[0]
        return logits

    loads.prepare = lambda runner: setattr(runner, "poison", poison)


@pytest.mark.parametrize("row", ROW)
def test_scoring_fails_cleanly(make_client: Callable[..., TestClient], loads: Loads, row: str) -> None:
    poisoned(loads, ROW[row])
    client = make_client(precisions="fp32")
    for path, body in SCORING.items():
        reply = client.post(path, json=body)
        assert reply.status_code == (500 if "v1" in path else 424), f"{path}: {reply.text}"
        assert "not numbers" in reply.text
        assert reply.headers["x-should-retry"] == "false"
    streamed = events(
        client.post("/v1/completions", json={**SCORING["/v1/completions"], "stream": True}).text
    )
    assert "not numbers" in streamed[-1]["error"]["message"]
    assert client.post("/generate", json={"inputs": PROMPT, "max_new_tokens": 2}).status_code == 200
    app = client.app
    assert isinstance(app, FastAPI)
    assert app.state.service.places.in_flight == 0


def test_a_token_of_probability_zero(make_client: Callable[..., TestClient], loads: Loads) -> None:
    """Its log-probability is −∞, which JSON can't represent; those of other tokens are unchanged."""
    ids = byte_tokenizer()(PROMPT)["input_ids"]

    def poison(logits: torch.Tensor, slots: object) -> torch.Tensor:
        logits[:, ids[2]] = -torch.inf
        return logits

    loads.prepare = lambda runner: setattr(runner, "poison", poison)
    client = make_client(precisions="fp32")
    answer = client.post("/v1/completions", json=SCORING["/v1/completions"]).json()["choices"][0]["logprobs"]
    assert answer["token_logprobs"][2] == MIN_LOGPROB
    logprobs = answer["token_logprobs"][1:]
    others = [value for id_, value in zip(ids[1:], logprobs, strict=True) if id_ != ids[2]]
    assert others
    assert all(-20 < value < 0 for value in others)


@pytest.mark.parametrize("on_a_device", [False, True])
def test_alternatives_of_probability_zero(on_a_device: bool) -> None:
    logits = torch.full((1, 11), -torch.inf)
    logits[0, 4] = 1.0
    sampler, rows = Sampler(frozenset()), [Sequence([1], SamplingParams(2, logprobs=True, top_n=3))]
    [token] = sampler.launch(logits, rows).wait() if on_a_device else sampler.sample(logits, rows)
    assert isinstance(token, Token)
    assert (token.id, token.logprob) == (4, 0.0)
    assert [logprob for _, logprob in token.top] == [0.0, MIN_LOGPROB, MIN_LOGPROB]


def test_an_infinite_perplexity(make_client: Callable[..., TestClient], loads: Loads) -> None:
    loads.prepare = lambda runner: setattr(runner, "poison", lambda logits, slots: logits * 1000)
    reply = make_client(precisions="fp32").post("/compare", json=SCORING["/compare"])
    assert (reply.status_code, "no finite perplexity" in reply.text) == (424, True)


def test_every_row_is_checked() -> None:
    logits = torch.zeros(5, 11)
    assert len(prompt_logprobs(logits, [1, 2, 3, 4, 5], 0)) == 5
    logits[4, 3] = torch.nan
    with pytest.raises(BadLogits):
        prompt_logprobs(logits, [1, 2, 3, 4, 5], 0)
