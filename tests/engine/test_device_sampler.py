"""Batched sampling gives the tokens of sampling row by row; tested on CPU tensors."""

from typing import Any

import pytest
import torch

from server.engine import device_sampler
from server.engine.faults import BadLogits
from server.engine.sampler import PendingTokens, Sampler, distribution
from server.engine.sequence import Sequence, Token
from tests.engine.test_sampler import VOCABULARY, logits, sequence

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "plain sampling": {},
    "cold": {"temperature": 1e-7},
    "warm": {"temperature": 1.7},
    "top_k": {"top_k": 20},
    "top_k 1": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 10**9},
    "top_p": {"top_p": 0.8},
    "small top_p": {"top_p": 1e-6},
    "large top_p": {"top_p": 0.999999},
    "typical_p": {"typical_p": 0.6},
    "small typical_p": {"typical_p": 1e-6},
    "min_p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.7},
    "repetition rewarded": {"repetition_penalty": 0.5, "do_sample": False},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.5},
    "both, greedy": {"frequency_penalty": 2.0, "presence_penalty": 2.0, "do_sample": False},
    "bias": {"logit_bias": ((8, 5.0), (9, -100.0), (3, 1.0))},
    "bias, greedy": {"logit_bias": ((8, 100.0),), "do_sample": False},
    "withheld": {"withheld": (8, 9, 402), "min_new_tokens": 6},
    "withheld, greedy": {"withheld": (8, 9, 402), "min_new_tokens": 6, "do_sample": False},
    "withheld no more": {"withheld": (8, 9, 402), "min_new_tokens": 5, "do_sample": False},
    "all at once": {
        "temperature": 1.3, "top_k": 50, "top_p": 0.9, "typical_p": 0.95, "min_p": 0.01,
        "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2,
        "logit_bias": ((4, 2.0),),
    },
}  # fmt: skip


def made(name: str, seed: int = 0, **more: Any) -> Sequence:
    one = sequence(seed=seed, **{**SETTINGS[name], **more})
    one.generated = [5, 9, 9, 9, 30]
    return one


def chosen(picks: PendingTokens) -> list[int]:
    ids = []
    for item in picks.wait():
        assert isinstance(item, Token), item
        ids.append(item.id)
    assert picks.ids is not None
    assert picks.ids.tolist() == ids
    return ids


def drawable(row: torch.Tensor, one: Sequence) -> torch.Tensor:
    """(vocabulary,) the probabilities that the device draws from."""
    weights = device_sampler._weights(device_sampler._adjust(row[None], [one]), [one])[0].double()
    return weights / weights.sum()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_distribution_is_the_samplers(name: str) -> None:
    for seed in range(5):
        row, one = logits(seed=seed)[0], made(name)
        torch.testing.assert_close(drawable(row, one), distribution(row, one), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_single_row_gets_the_token_of_the_sampler(name: str) -> None:
    sampler = Sampler(frozenset())
    for seed in range(40):
        row, one, other = logits(seed=seed), made(name, seed), made(name, seed)
        for _ in range(3):
            (expected,) = sampler.sample(row, [one])
            assert isinstance(expected, Token)
            assert chosen(sampler.launch(row, [other])) == [expected.id]
            for each in (one, other):
                each.generated.append(expected.id)


def test_a_batch_gets_the_tokens_of_its_single_rows() -> None:
    sampler, rows = Sampler(frozenset()), logits(len(SETTINGS))
    together = [made(name, seed) for seed, name in enumerate(SETTINGS)]
    alone = [made(name, seed) for seed, name in enumerate(SETTINGS)]
    for _ in range(10):
        expected = [chosen(sampler.launch(rows[i : i + 1], [one]))[0] for i, one in enumerate(alone)]
        assert chosen(sampler.launch(rows, together)) == expected
        for row, id_ in enumerate(expected):
            together[row].generated.append(id_)
            alone[row].generated.append(id_)


def test_a_row_is_independent_of_its_batch() -> None:
    """Every pair of settings; the other row's logits are extreme."""
    sampler, row = Sampler(frozenset()), logits(seed=3)
    for name in SETTINGS:
        expected = chosen(sampler.launch(row, [made(name, 11)]))
        for mate in SETTINGS:
            both = torch.cat((row, logits(seed=4) * 50))
            found = chosen(sampler.launch(both, [made(name, 11), made(mate, 12)]))
            assert found[:1] == expected, (name, mate)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 20,000 rows of one step; the bound is the 99.99 % point of 9 degrees."""
    row, count = torch.randn(10, generator=torch.Generator().manual_seed(4)), 20_000
    rows = [sequence(temperature=1.3, seed=seed) for seed in range(count)]
    found = torch.tensor(chosen(Sampler(frozenset()).launch(row.expand(count, 10), rows)))
    expected = distribution(row, rows[0]) * count
    assert float(((found.bincount(minlength=10) - expected) ** 2 / expected).sum()) < 33.7


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["greedy", "plain sampling", "all at once"])
def test_a_broken_row_fails_alone_and_its_token_is_a_valid_id(name: str, broken: float) -> None:
    """The next step may start from it before the host detects the error, so it must be a valid id."""
    rows = logits(3)
    rows[1] = broken
    mates = [made("plain sampling", 1), made(name, 2), made("greedy")]
    picks = Sampler(frozenset()).launch(rows, mates)
    first, second, third = picks.wait()
    assert isinstance(first, Token)
    assert isinstance(second, BadLogits)
    assert isinstance(third, Token)
    assert picks.ids is not None
    assert ((picks.ids >= 0) & (picks.ids < VOCABULARY)).all()


def test_alternatives_and_log_probabilities_are_those_of_each_row() -> None:
    sampler, rows = Sampler(frozenset()), logits(4)
    wanted: list[dict[str, Any]] = [{"top_n": 2}, {"logprobs": True}, {}, {"top_n": 5, "logprobs": True}]
    ones = [made("top_k", seed, **more) for seed, more in enumerate(wanted)]
    others = [made("top_k", seed, **more) for seed, more in enumerate(wanted)]
    for found, expected in zip(sampler.launch(rows, ones).wait(), sampler.sample(rows, others), strict=True):
        assert isinstance(found, Token)
        assert isinstance(expected, Token)
        assert found.id == expected.id
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [t.id for t in found.top] == [t.id for t in expected.top]
        assert [t.logprob for t in found.top] == pytest.approx([t.logprob for t in expected.top], abs=1e-5)


def test_more_alternatives_than_the_vocabulary_has() -> None:
    rows = torch.randn(2, 3)
    first, second = Sampler(frozenset()).launch(rows, [made("greedy", top_n=5), made("greedy")]).wait()
    assert isinstance(first, Token)
    assert isinstance(second, Token)
    assert (len(first.top), second.top, second.logprob) == (3, (), None)


def test_rows_that_fail_together_are_tried_alone_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = logits(3)
    expected = chosen(Sampler(frozenset()).launch(rows, [made("plain sampling", seed) for seed in range(3)]))
    real = device_sampler.sample_on_device

    def short_of_memory(part: torch.Tensor, ones: list[Sequence], points: list[float]) -> Any:
        if len(ones) > 1 or ones[0].params.top_k:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(part, ones, points)

    monkeypatch.setattr("server.engine.sampler.sample_on_device", short_of_memory)
    ones = [made("plain sampling", 0), made("plain sampling", 1), made("top_k", 2)]
    picks = Sampler(frozenset()).launch(rows, ones)
    first, second, third = picks.wait()
    assert picks.ids is None
    assert isinstance(first, Token)
    assert isinstance(second, Token)
    assert [first.id, second.id] == expected[:2]
    assert "out of memory" in str(third)
