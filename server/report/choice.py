"""The precision of a request with "auto": the best of the measured ones within bounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from server.report.advice import TOLERABLE, best, best_balanced
from server.report.rows import Row

Preference = Literal["quality", "speed", "memory"]
_REFERENCE = "fp32"


@dataclass(frozen=True)
class Bounds:
    """Limits of a precision's measured figures; None: no limit.

    Args:
        max_memory_bytes: weights and KV cache as in the report.
        max_perplexity_increase: as a share of fp32's: 0.02 is 2 %.
        max_kl: mean KL divergence from fp32, nats a token.
        min_tokens_per_second: decoded by one row.
        prefer: the order among precisions within the limits; None: balance of size and speed.
    """

    max_memory_bytes: int | None = None
    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    min_tokens_per_second: float | None = None
    prefer: Preference | None = None

    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "prefer"}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Choice:
    """A chosen precision and the reason.

    Args:
        decided_by: the bounds without which another one would be chosen; if none, ``prefer`` or ``balance``.
        reason: the same as a sentence.
    """

    precision: str
    decided_by: tuple[str, ...]
    reason: str


class NoneFits(Exception):
    """No precision meets the bounds; the message names the closest one."""


_OF: Mapping[str, Callable[[Row], float | None]] = {
    "max_memory_bytes": lambda row: row.memory_bytes,
    "max_perplexity_increase": lambda row: row.increase,
    "max_kl": lambda row: row.mean_kl,
    "min_tokens_per_second": lambda row: row.speed,
}
_SHOWN: Mapping[str, Callable[[float], str]] = {
    "max_memory_bytes": lambda value: f"{value:,.0f} bytes",
    "max_perplexity_increase": lambda value: f"perplexity {100 * value:+.2f} %".replace("-", "−"),
    "max_kl": lambda value: f"mean KL {value:.2e}",
    "min_tokens_per_second": lambda value: f"{value:,.1f} tokens a second",
}
_QUALITY, _SPEED = ("max_perplexity_increase", "max_kl"), "min_tokens_per_second"


def choose(rows: Sequence[Row], bounds: Bounds) -> Choice:
    """The best row within the bounds.

    Args:
        rows: the candidates that this host can run, with or without fp32.

    Raises:
        NoneFits: there are no candidates, or none meets the bounds.
    """
    if not rows:
        raise NoneFits("none of the measured precisions can run here")
    if not (found := _best(rows, bounds)):
        raise NoneFits(_refusal(rows, bounds))
    chosen, *as_good = found
    decided = _deciding(rows, bounds, chosen)
    reason = _reason(rows, bounds, chosen, decided) + _doubt(bounds, chosen, as_good)
    return Choice(chosen.precision, decided, reason)


def _best(rows: Sequence[Row], bounds: Bounds) -> list[Row]:
    """The chosen row, then those whose speeds can't be distinguished from its; empty if none fits."""
    fitting = [row for row in rows if not broken(row, bounds)]
    fitting = [row for row in fitting if not _doubtful(row, bounds)] or fitting
    if not fitting:
        return []
    if bounds.prefer == "memory":
        return [min(fitting, key=lambda row: row.weights_bytes)]
    if bounds.prefer == "speed":
        return best(fitting, lambda row: row.ratio_interval())
    known = [row for row in fitting if row.mean_kl is not None]
    if bounds.prefer == "quality" and known:
        return [min(known, key=lambda row: (row.mean_kl or 0.0, row.weights_bytes))]
    if bounds.prefer == "quality":  # not measured: more bits are closer to the original
        return [max(fitting, key=lambda row: row.bits_per_weight)]
    if any(name in bounds.given() for name in _QUALITY):  # the bounds replace TOLERABLE
        fitting = [replace(row, perplexity_ratio=1.0) for row in fitting]
    by_name = {row.precision: row for row in rows}
    return [by_name[row.precision] for row in best_balanced(fitting, _scale(rows))]


def _first(rows: Sequence[Row], bounds: Bounds) -> Row | None:
    return next(iter(_best(rows, bounds)), None)


def _scale(rows: Sequence[Row]) -> Row:
    """The row by which sizes and speeds are divided; any row gives the same order."""
    return next((row for row in rows if row.precision == _REFERENCE), rows[0])


def broken(row: Row, bounds: Bounds) -> dict[str, float]:
    """The bounds that a row violates, and each violation as a share; infinite if not measured."""
    found = {}
    for name, limit in bounds.given().items():
        value = _OF[name](row)
        if value is None:
            found[name] = float("inf")
        elif name.startswith("max_") and value > limit:
            found[name] = (value - limit) / max(abs(limit), 1e-9)
        elif name == _SPEED and row.speed_interval.high < limit:
            found[name] = (limit - value) / limit
    return found


def _doubtful(row: Row, bounds: Bounds) -> bool:
    """Whether the interval of its speed includes the required speed."""
    least, interval = bounds.min_tokens_per_second, row.speed_interval
    return least is not None and interval.low < least <= interval.high


def _doubt(bounds: Bounds, chosen: Row, as_good: Sequence[Row]) -> str:
    """The addition to the reason if measured speeds are too uncertain."""
    found = ""
    if _doubtful(chosen, bounds):
        low, high = chosen.speed_interval.low, chosen.speed_interval.high
        known = "not known" if math.isinf(high) else f"between {_SHOWN[_SPEED](low)} and {high:,.1f}"
        found += f"; whether it keeps to {_SPEED} can't be told: its speed is {known}"
    if as_good:
        names = ", ".join(row.precision for row in as_good)
        found += f"; it is smaller than {names}, from whose speed its own can't be told apart"
    return found


def _deciding(rows: Sequence[Row], bounds: Bounds, chosen: Row) -> tuple[str, ...]:
    """The bounds whose removal changes the choice; if none, those that the unbounded choice violates."""
    alone = [name for name in bounds.given() if _first(rows, replace(bounds, **{name: None})) is not chosen]
    if alone:
        return tuple(alone)
    favourite = _first(rows, Bounds(prefer=bounds.prefer))
    if favourite is not None and favourite is not chosen:
        return tuple(broken(favourite, bounds)) or tuple(bounds.given())
    return ("prefer",) if bounds.prefer else ("balance",)


def _reason(rows: Sequence[Row], bounds: Bounds, chosen: Row, decided: tuple[str, ...]) -> str:
    preferred = {
        "quality": "nearest to fp32",
        "speed": "fastest",
        "memory": "smallest",
        None: "best balance of size and speed",
    }[bounds.prefer]
    limits = [name for name in decided if name in _OF]
    if not limits:
        tolerable = f" that costs at most {TOLERABLE:.0%} of perplexity" if decided == ("balance",) else ""
        return f"{chosen.precision} is the {preferred}{tolerable} of the {len(rows)} measured here"
    kept = " and ".join(
        f"{name} {bounds.given()[name]} (it has {_SHOWN[name](_OF[name](chosen) or 0.0)})" for name in limits
    )
    return f"{chosen.precision} is the {preferred} within {kept}"


def _refusal(rows: Sequence[Row], bounds: Bounds) -> str:
    asked = " and ".join(f"{name} {value}" for name, value in bounds.given().items())
    judged = [row for row in rows if float("inf") not in broken(row, bounds).values()]
    if not judged:
        return f"quality was not measured, so that no precision can be chosen by {asked}"
    nearest = min(judged, key=lambda row: (len(broken(row, bounds)), sum(broken(row, bounds).values())))
    missed = " and ".join(_missed(name, nearest, bounds) for name in broken(nearest, bounds))
    return f"no precision keeps to {asked}; the nearest is {nearest.precision}, with {missed}"


def _missed(name: str, row: Row, bounds: Bounds) -> str:
    value = _OF[name](row)
    assert value is not None
    return f"{_SHOWN[name](value)} (asked for: {_SHOWN[name](bounds.given()[name])})"
