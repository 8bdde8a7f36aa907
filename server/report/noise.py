"""Whether the host was too noisy for the measured speeds; if so, the report's first sentences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.report.certainty import Interval
from server.report.rows import Row

WIDE = 1.25
"""A host is noisy above this factor: of a speed's interval, or between fp32's medians."""
_REFERENCE, _SHOWN = "fp32", 3


@dataclass(frozen=True)
class _Speed:
    """A precision's speed at one batch size: tokens a second for fp32, a ratio to fp32 for the others."""

    precision: str
    rows: int
    interval: Interval

    def __str__(self) -> str:
        at = _at(self.rows)
        low, high = self.interval.low, self.interval.high
        if math.isinf(high):
            return f"{self.precision}'s speed at {at} is not known"
        if self.precision == _REFERENCE:
            return f"{self.precision}'s speed at {at} lies between {low:,.0f} and {high:,.0f} tokens a second"
        return f"{self.precision}'s speed at {at} lies between {low:.2f} and {high:.2f} × fp32's"


def noise(rows: Sequence[Row]) -> list[str]:
    """Sentences about the noise; none if the host was quiet."""
    wide = sorted((one for one in _speeds(rows) if one.interval.factor > WIDE), key=_most_first)
    drift = _drift(rows)
    sentences = []
    if wide:
        more = [f"{len(wide) - _SHOWN} more are as uncertain"] if len(wide) > _SHOWN else []
        runs = max(one.interval.count for one in wide)
        sentences.append(
            f"This host was too noisy: after {'1 run' if runs == 1 else f'up to {runs} runs'}, "
            f"{_joined([*map(str, wide[:_SHOWN]), *more])}. "
            "Nothing is concluded from speeds that can't be told apart; "
            "`bitdial report` measures these again, best on an idle host."
        )
    if drift is not None:
        begin = "" if sentences else "This host was too noisy: "
        sentences.append(f"{begin}{drift}: compare the ratios, not the rates.")
    return sentences


def _speeds(rows: Sequence[Row]) -> list[_Speed]:
    found = []
    for row in rows:
        intervals = row.rate_intervals if row.precision == _REFERENCE else row.ratio_intervals
        found += [_Speed(row.precision, count, interval) for count, interval in intervals.items()]
    return found


def _most_first(speed: _Speed) -> float:
    return -speed.interval.factor


def _drift(rows: Sequence[Row]) -> str | None:
    """How much fp32's speed changed between its runs in turn with each precision, at the worst batch size."""
    found: dict[int, list[float]] = {}
    for row in rows:
        medians = row.tokens_per_second if row.precision == _REFERENCE else row.reference_rates
        for count, rate in medians.items():
            found.setdefault(count, []).append(rate)
    count, rates = max(found.items(), key=lambda one: max(one[1]) / min(one[1]), default=(1, [1.0]))
    if max(rates) / min(rates) <= WIDE:
        return None
    return (
        f"fp32 itself decoded between {min(rates):,.0f} and {max(rates):,.0f} tokens a second at {_at(count)}"
        " while the others were measured in turn with it"
    )


def _at(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _joined(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *before, last = parts
    return f"{', '.join(before)} and {last}" if before else last
