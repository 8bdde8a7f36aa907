"""Figures computed from token times; docs/benchmarks.md has the formulas."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from statistics import median

from server.bench.errors import BenchError

MILLISECONDS = 1000.0


@dataclass(frozen=True)
class Run:
    """One run of a batch: all rows start together and generate the same number of tokens."""

    arrivals: Sequence[Sequence[float]]
    """Per row, seconds from the start to each token."""
    prefill_seconds: float
    """Until every row has its first token, in a run of one token per row."""
    tokens: Sequence[Sequence[int]] = ()
    """Per row, the token ids."""

    @property
    def window(self) -> tuple[float, float]:
        """Start and end of the time in which all rows decode: last first token to first end of a row."""
        return max(row[0] for row in self.arrivals), min(row[-1] for row in self.arrivals)

    @property
    def decode_rate(self) -> float:
        """Tokens a second within the window.

        Raises:
            BenchError: a row ended before another had its first token.
        """
        begin, end = self.window
        if end <= begin:
            raise BenchError("a row ended before all had begun: generate more --tokens, or shorten --prompt")
        return sum(begin < time <= end for row in self.arrivals for time in row) / (end - begin)

    @property
    def gaps(self) -> list[float]:
        """Seconds between a row's tokens, within the window."""
        begin, end = self.window
        return [
            later - earlier
            for row in self.arrivals
            for earlier, later in pairwise(row)
            if begin <= earlier and later <= end
        ]


@dataclass(frozen=True)
class Figures:
    """Summary of several runs of one batch: medians over runs, percentiles over all tokens."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    spread: float
    """Of the decode rates: (largest − smallest) ÷ median."""
    ttft_ms: float
    """Median over rows and runs of the time to a row's first token."""
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    decode_rates: list[float] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; NaN without values."""
    if not values:
        return float("nan")
    return sorted(values)[max(ceil(share * len(values)) - 1, 0)]


def spread(values: Sequence[float]) -> float:
    """(largest − smallest) ÷ median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def summarize(runs: Sequence[Run], prompt: int) -> Figures:
    """
    Args:
        runs: of the same batch.
        prompt: tokens of each row's prompt.
    """
    rates = [run.decode_rate for run in runs]
    gaps = [gap for run in runs for gap in run.gaps]
    return Figures(
        prefill_tokens_per_second=median(len(run.arrivals) * prompt / run.prefill_seconds for run in runs),
        decode_tokens_per_second=median(rates),
        spread=spread(rates),
        ttft_ms=MILLISECONDS * median(row[0] for run in runs for row in run.arrivals),
        inter_token_p50_ms=MILLISECONDS * percentile(gaps, 0.5),
        inter_token_p99_ms=MILLISECONDS * percentile(gaps, 0.99),
        decode_rates=rates,
    )


@dataclass(frozen=True)
class Floor:
    """The minimum time of a memory-bound decode step: its bytes ÷ the bandwidth."""

    weights_bytes: int
    """Read by every step, whatever the batch."""
    kv_bytes: float
    """Read by a step of the whole batch at its mean context."""
    bandwidth: float
    rows: int

    @property
    def step_seconds(self) -> float:
        return (self.weights_bytes + self.kv_bytes) / self.bandwidth

    @property
    def tokens_per_second(self) -> float:
        return self.rows / self.step_seconds

    def share(self, tokens_per_second: float) -> float:
        """A measured rate ÷ the limit."""
        return tokens_per_second / self.tokens_per_second


def mean_context(prompt: int, tokens: int) -> float:
    """Keys that a decode step attends to, averaged over the steps of a run.

    Step k of 1 … tokens − 1 appends the k-th generated token and attends to prompt + k keys.
    """
    return prompt + tokens / 2
