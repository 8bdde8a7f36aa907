from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine.faults import BadLogits
from server.engine.logprobs import prompt_logprobs
from server.engine.sampler import Sampler, distribution
from server.engine.sequence import SamplingParams, Sequence, Token

VOCABULARY = 500
PROMPT = [3, 7, 7, 11]


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def sequence(**params: Any) -> Sequence:
    return Sequence(PROMPT, SamplingParams(**{"max_new_tokens": 100, "do_sample": True, **params}))


def tokens(picked: list[Token | Exception]) -> list[int]:
    for item in picked:
        if isinstance(item, Exception):
            raise item
    return [item.id for item in picked if isinstance(item, Token)]


@pytest.mark.parametrize(
    ("params", "reference"),
    [
        ({}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 20}, [TopKLogitsWarper(20)]),
        ({"top_k": 10**9}, []),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
        (
            {"temperature": 1.6, "top_k": 50, "top_p": 0.9},
            [TemperatureLogitsWarper(1.6), TopKLogitsWarper(50), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_the_distribution_is_the_one_transformers_defines(
    params: dict[str, Any], reference: list[Any]
) -> None:
    row = logits()
    expected = LogitsProcessorList(reference)(torch.tensor([PROMPT]), row).double().softmax(-1)[0]
    torch.testing.assert_close(distribution(row[0], sequence(**params)), expected, atol=1e-6, rtol=1e-4)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 20,000 draws of one stream; the bound is the 99.99 % point of 9 degrees."""
    row = torch.randn(10, generator=torch.Generator().manual_seed(4))
    one = sequence(temperature=1.3, seed=17)
    counts = torch.zeros(10)
    draws = 20_000
    sampler = Sampler(frozenset())
    for _ in range(draws):
        counts[tokens(sampler.sample(row[None], [one]))[0]] += 1
    expected = distribution(row, one) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 33.7


def test_a_row_depends_on_its_own_seed_and_logits_only() -> None:
    sampler, rows = Sampler(frozenset()), logits(8)
    settings: list[dict[str, Any]] = [
        {"do_sample": False},
        {"seed": 1},
        {"seed": 2, "top_p": 0.5},
        {"seed": 3, "top_k": 4},
        {"seed": 4, "temperature": 3.0},
        {"seed": 5, "typical_p": 0.5},
        {"seed": 6, "min_p": 0.1},
        {"seed": 7, "frequency_penalty": 1.0},
    ]
    together = [sequence(**params) for params in settings]
    mixed = [tokens(sampler.sample(rows, together)) for _ in range(5)]
    for i, params in enumerate(settings):
        alone = sequence(**params)
        found = [tokens(sampler.sample(rows[i : i + 1], [alone]))[0] for _ in range(5)]
        assert found == [m[i] for m in mixed]


def test_greedy_takes_the_largest_after_penalties_and_bias() -> None:
    sampler = Sampler(frozenset())
    row = torch.zeros(1, 12)
    row[0, 3], row[0, 5] = 2.0, 1.9
    assert tokens(sampler.sample(row, [sequence(do_sample=False)])) == [3]
    assert tokens(sampler.sample(row, [sequence(do_sample=False, repetition_penalty=2.0)])) == [5]
    assert tokens(sampler.sample(row, [sequence(do_sample=False, logit_bias=((8, 5.0),))])) == [8]
    repeated = sequence(do_sample=False, presence_penalty=0.5)
    repeated.generated = [3]
    assert tokens(sampler.sample(row, [repeated])) == [5]


@pytest.mark.parametrize("temperature", [1e-45, 1e-7, 0.01])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    assert tokens(Sampler(frozenset()).sample(logits(), [sequence(temperature=temperature)])) == [
        int(logits().argmax())
    ]


def test_a_row_of_nan_fails_alone() -> None:
    rows = logits(3)
    rows[1, 4] = float("nan")
    first, broken, last = Sampler(frozenset()).sample(rows, [sequence(do_sample=False) for _ in range(3)])
    assert isinstance(first, Token)
    assert isinstance(broken, BadLogits)
    assert isinstance(last, Token)


def test_logprobs_are_those_before_filters() -> None:
    row = logits()
    expected = row[0].log_softmax(-1)
    one = sequence(temperature=0.5, top_k=3, logprobs=True, top_n=5)
    (token,) = Sampler(frozenset()).sample(row, [one])
    assert isinstance(token, Token)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
    assert [t.id for t in token.top] == expected.topk(5).indices.tolist()
    assert [t.logprob for t in token.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-5)


def test_prompt_logprobs_are_those_of_the_following_tokens() -> None:
    rows = logits(2)
    found = prompt_logprobs(rows, [9, 4], top_n=1)
    expected = rows.log_softmax(-1)
    assert [t.logprob for t in found] == pytest.approx(
        [float(expected[0, 9]), float(expected[1, 4])], abs=1e-5
    )
    assert found[0].top[0].id == int(rows[0].argmax())


def test_the_end_token_and_the_length_finish_a_sequence() -> None:
    row = torch.zeros(1, 10)
    row[0, 3] = 1.0
    sampler = Sampler(frozenset({3}))

    def finish(**params: Any) -> str | None:
        (token,) = sampler.sample(row, [sequence(do_sample=False, **params)])
        assert isinstance(token, Token)
        return token.finish

    assert finish() == "eos_token"
    assert finish(ignore_eos=True) is None
    assert finish(ignore_eos=True, max_new_tokens=1) == "length"


def test_a_bias_is_made_into_tensors_once() -> None:
    row = sequence(do_sample=False, logit_bias=tuple((id_, -100.0) for id_ in range(VOCABULARY - 1)))
    assert tokens(Sampler(frozenset()).sample(logits(), [row])) == [VOCABULARY - 1]
    made = row.bias
    assert tokens(Sampler(frozenset()).sample(logits(seed=1), [row])) == [VOCABULARY - 1]
    assert row.bias is made
