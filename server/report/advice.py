"""The recommended precision, in sentences derived from the measured figures alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.report.certainty import LEVEL, Interval, perhaps_best
from server.report.noise import noise
from server.report.rows import Row, dominates

TOLERABLE = 0.02
"""Default limit of the perplexity increase, as a share: hardly visible in generated text."""
_LEVEL = 0.02  # ratios closer to 1 than this count as equal
_CLOSE = 1.1  # an interval with a larger factor is shown beside its ratio
_REFERENCE = "fp32"
Cost = Callable[[Row], tuple[float, ...]]


@dataclass(frozen=True)
class Advice:
    """A recommendation and its reasons.

    Args:
        precision: the recommended one; None if fp32 was not measured.
        sentences: warnings of a noisy host, if it was; the recommendation; then when to choose another
            precision, and warnings about single ones.
    """

    precision: str | None
    sentences: tuple[str, ...]


def balance(row: Row, reference: Row) -> Interval:
    """The geometric mean of the size ratio and the speed ratio to the reference; larger is better."""
    smaller, faster = reference.weights_bytes / row.weights_bytes, row.ratio_interval()
    return Interval(math.sqrt(smaller * faster.low), math.sqrt(smaller * faster.high), faster.count)


def best_balanced(rows: Sequence[Row], reference: Row) -> list[Row]:
    """The rows with the best ``balance`` among those of tolerable quality, or all if none was measured.

    If none is tolerable, the row with the least divergence from the reference.

    Returns: the rows whose speeds can't be distinguished from the best one's, the smallest first.
    """
    unknown = all(row.mean_kl is None for row in rows)
    eligible = [row for row in rows if unknown or (row.increase is not None and row.increase <= TOLERABLE)]
    if not eligible:
        return [min(rows, key=lambda row: math.inf if row.mean_kl is None else row.mean_kl)]
    return best(eligible, lambda row: balance(row, reference))


def best(rows: Sequence[Row], of: Callable[[Row], Interval]) -> list[Row]:
    """The rows that may be the best, the smallest first: sizes are exact, speeds are not."""
    return sorted(perhaps_best(rows, of), key=lambda row: (row.weights_bytes, row.mean_kl or 0.0))


def advise(rows: Sequence[Row], no_quality: str | None = None) -> Advice:
    """
    Args:
        rows: with fp32's.
        no_quality: why quality has no figures, if it has none.
    """
    reference = next((row for row in rows if row.precision == _REFERENCE), None)
    if reference is None:
        return Advice(None, ("Nothing can be advised: fp32 was not measured.",))
    if len(rows) == 1:
        return Advice(_REFERENCE, ("Run fp32: nothing else was measured.",))
    chosen, *as_good = best_balanced(rows, reference)
    first = f"Run {chosen.precision}: {described(chosen, reference)}."
    if chosen is reference:
        first = (
            "Run fp32: no other precision is a better balance of size and speed at tolerable quality here."
        )
    others = [
        *([] if not as_good else [f"It is the smallest of those that {undecided(as_good)}."]),
        *([] if no_quality is None else [f"Nothing is said here about quality: {no_quality}."]),
        *_alternatives(rows, reference, chosen),
        *_warnings(rows, reference),
    ]
    return Advice(chosen.precision, (*noise(rows), first, *others))


def undecided(rows: Sequence[Row]) -> str:
    names = ", ".join(row.precision for row in rows)
    return f"may be the best balance of size and speed ({names} too): their speeds can't be told apart"


def described(row: Row, reference: Row) -> str:
    """``2.5 × smaller, perplexity +1.9 %, 1.4 × faster here``: size of the weights, speed of one row."""
    parts = [_times(reference.weights_bytes / row.weights_bytes, "smaller", "larger")]
    if row.increase is not None:
        parts.append(perplexity(row))
    parts.append(f"{_speed(row)} here")
    return ", ".join(parts)


def _speed(row: Row, rows: int = 1) -> str:
    """The speed of ``rows`` rows decoded together; faster or slower than fp32 only if that is certain."""
    ratio, interval = row.speed_ratios[rows], row.ratio_interval(rows)
    if math.isinf(interval.high):
        return "its speed not known"
    if interval.low <= 1 <= interval.high and interval.factor > LEVEL:
        return f"its speed between {interval.low:.2f} and {interval.high:.2f} × fp32's"
    text = _times(ratio, "faster", "slower")
    if interval.factor <= _CLOSE:
        return text
    return f"{text} ({interval.low:.2f} to {interval.high:.2f} × fp32's speed)"


def perplexity(row: Row) -> str:
    assert row.increase is not None
    return f"perplexity {_signed(100 * row.increase)} %"


def _signed(percent: float) -> str:
    """Two significant digits: +12, +1.9, +0.05; below 0.0005 it is ±0."""
    if abs(percent) < 0.0005:
        return "±0"
    shown = f"{percent:+.0f}" if abs(percent) >= 10 else f"{percent:+.2g}"
    return shown.replace("-", "−")


def _times(ratio: float, more: str, less: str) -> str:
    if abs(ratio - 1) < _LEVEL:
        return {"smaller": "as large", "faster": "as fast"}[more]
    return f"{ratio:.1f} × {more}" if ratio >= 1 else f"{1 / ratio:.1f} × {less}"


def _alternatives(rows: Sequence[Row], reference: Row, chosen: Row) -> list[str]:
    """One sentence for each precision that is better than the chosen one in some respect."""
    costs: list[tuple[str, Cost]] = [
        ("memory is what is short", lambda row: (row.weights_bytes, row.mean_kl or 0.0)),
    ]
    speeds: list[tuple[str, Callable[[Row], Interval]]] = [
        ("one stream must be fast", lambda row: row.ratio_interval()),
        ("many streams share the host", lambda row: row.batch_interval),
    ]
    if all(row.mean_kl is not None for row in rows):
        costs.insert(0, ("nothing may be lost", _loss_then_size(rows)))
    found: dict[str, list[str]] = {}
    by_name = {row.precision: row for row in rows}
    for case, cost in costs:
        cheapest = min(rows, key=cost)
        if cheapest is not chosen and cost(cheapest) < cost(chosen):
            found.setdefault(cheapest.precision, []).append(case)
    for case, of in speeds:
        fastest = best(rows, of)[0]
        if of(fastest).above(of(chosen)):
            found.setdefault(fastest.precision, []).append(case)
    return [
        f"Choose {name} if {' or '.join(cases)}: {_compared(by_name[name], reference)}."
        for name, cases in found.items()
    ]


def _compared(row: Row, reference: Row) -> str:
    if row is reference:
        return f"{row.weights_bytes / 1e6:,.1f} MB of weights, {row.speed:,.0f} tokens a second"
    many = row.most_rows
    batch = f", {_speed(row, many)} at {many} streams" if many > 1 else ""
    return described(row, reference) + batch


def _loss_then_size(rows: Sequence[Row]) -> Cost:
    """The smallest of the lossless rows: perplexity within two standard errors of fp32's."""

    def cost(row: Row) -> tuple[float, ...]:
        assert row.increase is not None
        error = row.perplexity_ratio_error or 0.0
        lossless = row.precision == _REFERENCE or (
            row.increase <= 2 * error and (row.top1_agreement or 0) >= _SAME
        )
        return (row.weights_bytes if lossless else math.inf,)

    return cost


_SAME = 0.99  # least top-1 agreement of a lossless row


def _warnings(rows: Sequence[Row], reference: Row) -> list[str]:
    found = []
    for row in rows:
        better = [other for other in rows if dominates(other, row)]
        if row.warning is not None:
            found.append(f"Beware: {row.warning}.")
        if row is not reference and row.ratio_interval().high < 1 and row.speed_ratio < 1 - _LEVEL:
            found.append(f"{row.precision} is slower than fp32 here: {row.speed_ratio:.2f} × its speed.")
        if better:
            smallest = min(better, key=lambda other: other.weights_bytes)
            found.append(
                f"{smallest.precision} is as good as {row.precision} or better in every respect measured."
            )
    return found
