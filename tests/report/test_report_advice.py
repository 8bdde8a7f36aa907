"""Conclusions from measured figures: the Pareto front, the recommendation, the choice within bounds."""

from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from server.report.advice import advise
from server.report.choice import Bounds, NoneFits, choose
from server.report.rows import Row, dominates, front, quality_means_something, rows_of, why_no_quality


def row(
    precision: str,
    megabytes: float,
    speed: float,
    batch: float | None = None,
    increase: float | None = 0.0,
    kl: float | None = 0.0,
    **more: Any,
) -> Row:
    """Speeds as ratios to an fp32 of 100 tokens a second."""
    weights = round(megabytes * 1e6)
    ratio = None if increase is None else 1 + increase
    return Row(
        precision, 500_000_000, weights, weights + 10_000_000, 8.0, 1.0,
        {1: 100 * speed, 8: 400 * (batch or speed)}, {1: speed, 8: batch or speed}, 5.0,
        None if ratio is None else 20 * ratio, ratio, None if ratio is None else 1e-3, kl, kl, 1 - (kl or 0),
        **more,
    )  # fmt: skip


FP32 = row("fp32", 500, 1.0)
BF16 = row("bf16", 250, 1.5, increase=0.0001, kl=1e-4)
INT8 = replace(row("int8", 200, 1.8, batch=2.5, increase=0.0005, kl=1e-3), top1_agreement=0.975)
NF4 = row("nf4", 125, 2.2, batch=2.0, increase=0.019, kl=2e-2)
FP4 = row("fp4", 125, 2.1, batch=1.9, increase=0.04, kl=4e-2)
ALL = [FP32, BF16, INT8, NF4, FP4]


def test_the_front_has_the_undominated_precisions() -> None:
    assert front(ALL) == {"fp32", "bf16", "int8", "nf4"}
    assert dominates(NF4, FP4)
    assert not dominates(FP4, FP4)
    assert not dominates(INT8, NF4)
    assert front([FP32, replace(FP32, precision="twin")]) == {"fp32", "twin"}


def test_without_quality_the_front_is_of_size_and_speed() -> None:
    blind = [replace(one, mean_kl=None, perplexity_ratio=None) for one in ALL]
    assert front(blind) == {"int8", "nf4"}


def test_the_best_balance_at_tolerable_quality_is_recommended() -> None:
    advice = advise(ALL)
    assert advice.precision == "nf4"
    first, *others = advice.sentences
    assert first == "Run nf4: 4.0 × smaller, perplexity +1.9 %, 2.2 × faster here."
    assert (
        "Choose bf16 if nothing may be lost: 2.0 × smaller, perplexity +0.01 %, 1.5 × faster here, "
        "1.5 × faster at 8 streams." in others
    )
    assert any(one.startswith("Choose int8 if many streams share the host: 2.5 × smaller") for one in others)
    assert "nf4 is as good as fp4 or better in every respect measured." in others


def test_a_precision_with_too_much_loss_is_not_recommended() -> None:
    worse = replace(NF4, perplexity_ratio=1.021)
    assert advise([FP32, BF16, INT8, worse]).precision == "int8"


def test_fp32_is_recommended_if_every_loss_is_too_large() -> None:
    advice = advise([FP32, FP4])
    assert advice.precision == "fp32"
    assert advice.sentences[0].startswith("Run fp32: no other precision is a better balance")
    assert any(
        one.startswith("Choose fp4 if memory is what is short or one stream") for one in advice.sentences
    )


def test_a_slower_precision_is_named() -> None:
    slow = row("int8", 200, 0.5, increase=0.0001, kl=1e-3)
    advice = advise([FP32, slow])
    assert "int8 is slower than fp32 here: 0.50 × its speed." in advice.sentences
    assert any("2.0 × slower here" in one for one in advice.sentences)


def test_a_precision_that_hardly_quantizes_gets_a_warning() -> None:
    hollow = replace(INT8, warning="int8 has quantized only 16% of this model's linear weights")
    assert (
        "Beware: int8 has quantized only 16% of this model's linear weights."
        in advise([FP32, hollow]).sentences
    )


def test_without_quality_the_advice_says_only_that() -> None:
    blind = [replace(one, mean_kl=None, perplexity_ratio=None, perplexity_ratio_error=None) for one in ALL]
    advice = advise(blind, "it was not measured")
    assert advice.precision == "nf4"
    assert not any("perplexity" in one or "lost" in one for one in advice.sentences)
    assert "Nothing is said here about quality: it was not measured." in advice.sentences


def test_fp32_alone_is_compared_with_nothing() -> None:
    assert advise([FP32]).sentences == ("Run fp32: nothing else was measured.",)


def test_without_fp32_there_is_no_advice() -> None:
    assert advise([NF4]).precision is None


@pytest.mark.parametrize(
    ("increase", "shown"),
    [
        (0.019, "+1.9 %"),
        (0.123, "+12 %"),
        (0.0005, "+0.05 %"),
        (-0.00003, "−0.003 %"),
        (1e-7, "±0 %"),
        (0.0, "±0 %"),
    ],
)
def test_an_increase_has_two_digits(increase: float, shown: str) -> None:
    small = row("nf4", 100, 2.0, increase=increase, kl=1e-2)
    assert any(f"perplexity {shown}" in one for one in advise([FP32, small]).sentences)


def batch(rates: list[float], reference: list[float] | None = None) -> dict[str, Any]:
    """A precision's figures from its rates and the interleaved ones of fp32."""
    ratios = [one / other for one, other in zip(rates, reference or rates, strict=True)]
    return {
        "decode_tokens_per_second": median(rates), "ratio_to_fp32": median(ratios), "ttft_ms": 5,
        "decode_rates": rates, "reference_rates": reference or [], "ratios": ratios,
    }  # fmt: skip


def document(perplexity: float | None, vocabulary: int = 50257) -> dict[str, Any]:
    speed = {"batches": {n: batch([100.0] * 5) for n in "18"}}
    loading = {
        "disk_bytes": 1, "weights_bytes": 4, "kv_cache_bytes": 2, "bits_per_weight": 32.0,
        "load_seconds": 1.0, "proof": None,
    }  # fmt: skip
    steps: dict[str, Any] = {"loading": loading, "speed": speed}
    if perplexity is not None:
        steps["quality"] = {"perplexity": perplexity, "perplexity_ratio": 1.0, "mean_kl": 0.0}
    return {"model": {"vocabulary": vocabulary}, "precisions": {"fp32": steps, "nf4": {"loading": loading}}}


def test_a_model_at_chance_level_has_no_quality() -> None:
    assert quality_means_something(document(29.9))
    assert not quality_means_something(document(52000.0))
    assert not quality_means_something(document(None))
    assert "no better than chance (perplexity 52,000 a token, of a vocabulary of 50,257)" in str(
        why_no_quality(document(52000.0))
    )
    (guessing,) = rows_of(document(52000.0))
    assert guessing.mean_kl is guessing.perplexity is None
    (trained,) = rows_of(document(29.9))  # nf4's speed is not known yet
    assert (trained.memory_bytes, trained.perplexity) == (6, 29.9)


@pytest.mark.parametrize(
    ("bounds", "precision", "decided"),
    [
        (Bounds(), "nf4", ("balance",)),
        (Bounds(prefer="quality"), "fp32", ("prefer",)),
        (Bounds(prefer="speed"), "nf4", ("prefer",)),
        (Bounds(prefer="memory"), "nf4", ("prefer",)),
        (Bounds(max_perplexity_increase=0.001), "int8", ("max_perplexity_increase",)),
        (Bounds(max_kl=5e-4), "bf16", ("max_kl",)),
        (Bounds(max_memory_bytes=220_000_000, prefer="quality"), "int8", ("max_memory_bytes",)),
        (Bounds(min_tokens_per_second=170, prefer="quality"), "int8", ("min_tokens_per_second",)),
        (Bounds(max_memory_bytes=220_000_000, max_kl=5e-3), "int8", ("max_kl",)),
        (Bounds(max_memory_bytes=10**12, prefer="quality"), "fp32", ("prefer",)),
        # each alone excludes the best one, so neither alone decides
        (Bounds(max_perplexity_increase=0.001, max_kl=0.01), "int8", ("max_perplexity_increase", "max_kl")),
    ],
)  # fmt: skip
def test_a_choice_and_what_decided_it(bounds: Bounds, precision: str, decided: tuple[str, ...]) -> None:
    found = choose(ALL, bounds)
    assert (found.precision, found.decided_by) == (precision, decided)
    assert found.reason.startswith(f"{precision} is the ")
    for name in decided:
        assert name in found.reason or name in ("prefer", "balance")


def test_the_reason_has_the_figure_that_keeps_to_the_bound() -> None:
    found = choose(ALL, Bounds(max_perplexity_increase=0.001))
    assert found.reason == (
        "int8 is the best balance of size and speed within max_perplexity_increase 0.001 "
        "(it has perplexity +0.05 %)"
    )


def test_bounds_on_quality_replace_the_default_tolerance() -> None:
    assert choose([FP32, FP4], Bounds()).precision == "fp32"
    assert choose([FP32, FP4], Bounds(max_perplexity_increase=0.05)).precision == "fp4"


def test_if_none_is_within_the_bounds_the_nearest_is_named() -> None:
    with pytest.raises(NoneFits, match=r"no precision keeps to max_memory_bytes 100000000;") as caught:
        choose(ALL, Bounds(max_memory_bytes=100_000_000))
    assert "the nearest is nf4, with 135,000,000 bytes (asked for: 100,000,000 bytes)" in str(caught.value)
    with pytest.raises(NoneFits, match=r"the nearest is nf4, with perplexity \+1\.90 % ") as caught:
        choose([FP32, NF4], Bounds(max_memory_bytes=150_000_000, max_perplexity_increase=0.015))
    assert "asked for: perplexity +1.50 %" in str(caught.value)


def test_bounds_on_quality_where_it_is_not_known() -> None:
    blind = [replace(one, mean_kl=None, perplexity_ratio=None) for one in ALL]
    with pytest.raises(NoneFits, match="quality was not measured"):
        choose(blind, Bounds(max_kl=1.0))
    assert choose(blind, Bounds(prefer="quality")).precision == "fp32"
    assert choose(blind, Bounds(max_memory_bytes=140_000_000)).precision == "nf4"


def test_no_candidates() -> None:
    with pytest.raises(NoneFits, match="none of the measured precisions"):
        choose([], Bounds())
