"""A report's document as one row per precision, and the Pareto front of the rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from server.report.certainty import Interval, interval_of

_REFERENCE = "fp32"
_CHANCE = 0.5  # of the vocabulary: a higher perplexity is chance


@dataclass(frozen=True)
class Row:
    """One precision's figures; None: not measured.

    Args:
        disk_bytes: size of the checkpoint that it is loaded from.
        weights_bytes: size of its tensors, scales included.
        memory_bytes: weights and KV cache.
        load_seconds: from the checkpoint to a model that can run.
        tokens_per_second: decoding rate, by batch size.
        speed_ratios: rate ÷ fp32's, by batch size. Both were measured in turn, so ratios compare precisions
            better than rates, which were taken at different times.
        ttft_ms: time to first token of one row; the document has the prompt's length.
        perplexity_ratio, perplexity_ratio_error: perplexity ÷ fp32's, and its standard error.
        warning: that a "quantized" model hardly is.
        rate_intervals, ratio_intervals: confidence intervals by batch size; a missing one is exact.
        reference_rates: fp32's median rate in the rounds of this precision, by batch size.
    """

    precision: str
    disk_bytes: int
    weights_bytes: int
    memory_bytes: int
    bits_per_weight: float
    load_seconds: float
    tokens_per_second: Mapping[int, float]
    speed_ratios: Mapping[int, float]
    ttft_ms: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    mean_kl: float | None = None
    p99_kl: float | None = None
    top1_agreement: float | None = None
    warning: str | None = None
    rate_intervals: Mapping[int, Interval] = field(default_factory=dict)
    ratio_intervals: Mapping[int, Interval] = field(default_factory=dict)
    reference_rates: Mapping[int, float] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """Tokens per second of one row."""
        return self.tokens_per_second[1]

    @property
    def speed_ratio(self) -> float:
        """Speed of one row ÷ fp32's."""
        return self.speed_ratios[1]

    @property
    def most_rows(self) -> int:
        return max(self.speed_ratios)

    @property
    def speed_interval(self) -> Interval:
        """The confidence interval of ``speed``."""
        return self.rate_intervals.get(1) or Interval.exactly(self.speed)

    def ratio_interval(self, rows: int = 1) -> Interval:
        """The confidence interval of the ratio to fp32's speed, at a batch of ``rows``."""
        return self.ratio_intervals.get(rows) or Interval.exactly(self.speed_ratios[rows])

    @property
    def batch_interval(self) -> Interval:
        return self.ratio_interval(self.most_rows)

    @property
    def increase(self) -> float | None:
        """The increase of the perplexity, as a share of fp32's."""
        return None if self.perplexity_ratio is None else self.perplexity_ratio - 1


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The precisions whose size and speed were measured: fp32, then the others, the largest first."""
    measured = {
        name: steps for name, steps in document["precisions"].items() if {"loading", "speed"} <= steps.keys()
    }
    rows = [_row(name, steps) for name, steps in measured.items()]
    if not quality_means_something(document):
        rows = [_without_quality(row) for row in rows]
    return sorted(rows, key=lambda row: (row.precision != _REFERENCE, -row.weights_bytes, row.precision))


def _row(name: str, steps: Mapping[str, Any]) -> Row:
    loading, quality = steps["loading"], steps.get("quality") or {}
    proof, batches = loading["proof"] or {}, steps["speed"]["batches"]
    return Row(
        name,
        loading["disk_bytes"],
        loading["weights_bytes"],
        loading["weights_bytes"] + loading["kv_cache_bytes"],
        loading["bits_per_weight"],
        loading["load_seconds"],
        {int(rows): figures["decode_tokens_per_second"] for rows, figures in batches.items()},
        {int(rows): figures["ratio_to_fp32"] for rows, figures in batches.items()},
        batches["1"]["ttft_ms"],
        quality.get("perplexity"),
        quality.get("perplexity_ratio"),
        quality.get("perplexity_ratio_error"),
        quality.get("mean_kl"),
        quality.get("p99_kl"),
        quality.get("top1_agreement"),
        proof.get("warning"),
        {int(rows): interval_of(figures["decode_rates"]) for rows, figures in batches.items()},
        {int(rows): _ratio_interval(figures) for rows, figures in batches.items()},
        {
            int(rows): median(figures["reference_rates"])
            for rows, figures in batches.items()
            if figures["reference_rates"]
        },
    )


def _ratio_interval(figures: Mapping[str, Any]) -> Interval:
    return interval_of(figures["ratios"]) if figures["reference_rates"] else Interval.exactly(1.0)


def _without_quality(row: Row) -> Row:
    names = (
        "perplexity",
        "perplexity_ratio",
        "perplexity_ratio_error",
        "mean_kl",
        "p99_kl",
        "top1_agreement",
    )
    return replace(row, **dict.fromkeys(names))  # type: ignore[arg-type]


def quality_means_something(document: Mapping[str, Any]) -> bool:
    """Whether quality was measured, and the model predicts the text better than chance."""
    return why_no_quality(document) is None


def why_no_quality(document: Mapping[str, Any]) -> str | None:
    """Why the report has no quality figures; None if it has.

    A model of random weights gives every token about the same probability, 1 ÷ vocabulary.
    """
    perplexity = ((document["precisions"].get(_REFERENCE) or {}).get("quality") or {}).get("perplexity")
    vocabulary = document["model"]["vocabulary"]
    if perplexity is None:
        return "it was not measured"
    if perplexity < _CHANCE * vocabulary:
        return None
    return (
        f"the model predicts this text no better than chance (perplexity {perplexity:,.0f} a token, of a "
        f"vocabulary of {vocabulary:,}), as weights drawn at random do; how near another precision comes to "
        "guessing says nothing about a trained model"
    )


def front(rows: Sequence[Row]) -> frozenset[str]:
    """The precisions on the Pareto front: those that no other row ``dominates``.

    Compared are weight bytes, speed of one row and of the largest batch, and KL divergence if measured.
    """
    return frozenset(row.precision for row in rows if not any(dominates(other, row) for other in rows))


def dominates(one: Row, other: Row) -> bool:
    """Whether ``one`` is known to be as good as ``other`` in every respect and better in one."""
    costs = list(zip(_costs(one), _costs(other), strict=True))
    speeds = list(zip(_speeds(one), _speeds(other), strict=True))
    as_good = all(a <= b for a, b in costs) and all(a.as_good_as(b) for a, b in speeds)
    return as_good and (any(a < b for a, b in costs) or any(a.above(b) for a, b in speeds))


def _costs(row: Row) -> tuple[float, ...]:
    """The exact figures, of which less is better."""
    return row.weights_bytes, math.inf if row.mean_kl is None else row.mean_kl


def _speeds(row: Row) -> tuple[Interval, ...]:
    return row.ratio_interval(), row.batch_interval
