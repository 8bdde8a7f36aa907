"""The columns of a report's table, the same on the terminal, in Markdown and in HTML."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server import tables
from server.report.noise import WIDE
from server.report.rows import Row, front, quality_means_something, rows_of
from server.tables import NONE

Column = tuple[str, Callable[[Row], str]]
_MEGA = 1e6

_SIZE: list[Column] = [
    ("disk MB", lambda row: f"{row.disk_bytes / _MEGA:,.1f}"),
    ("weights MB", lambda row: f"{row.weights_bytes / _MEGA:,.1f}"),
    ("with cache", lambda row: f"{row.memory_bytes / _MEGA:,.1f}"),
    ("bits", lambda row: f"{row.bits_per_weight:.2f}"),
    ("load s", lambda row: f"{row.load_seconds:.2f}"),
]
_QUALITY: list[Column] = [
    ("perplexity", lambda row: shown(row.perplexity, ".5g")),
    ("ratio ±", lambda row: _ratio(row)),
    ("mean KL", lambda row: shown(row.mean_kl, ".2e")),
    ("top-1", lambda row: shown(row.top1_agreement, ".2%")),
]
_SPEED: list[Column] = [
    ("TTFT ms", lambda row: shown(row.ttft_ms, ".1f")),
    ("tok/s", lambda row: _rate(row, 1)),
    ("tok/s of 8", lambda row: _rate(row, 8)),
    ("× fp32", lambda row: _speed_ratio(row)),
]
LEGEND = """\
disk         the checkpoint that every precision is made from while loading; nothing else is written
weights      in memory, scales included; with cache: and the KV cache of 8 sequences; bits: a parameter
ratio ±      perplexity ÷ fp32's, and its standard error (paired differences of the tokens)
mean KL      divergence from fp32's distribution, nats a token; top-1: same most probable token
TTFT         time to first token, one row; tok/s: decoded by one row, and by eight together
~            the runs lay far apart: the rate is not known better than to within a quarter
× fp32       of one row, measured in turn with fp32; from – to, where the runs lay far apart
*            on the Pareto front: of no other is known that it is as good in all respects and better in one"""


def _rate(row: Row, rows: int) -> str:
    if (rate := row.tokens_per_second.get(rows)) is None:
        return NONE
    interval = row.rate_intervals.get(rows)
    return f"{'~' if interval is not None and interval.factor > WIDE else ''}{rate:,.0f}"


def _speed_ratio(row: Row) -> str:
    interval = row.ratio_interval()
    if math.isinf(interval.high):
        return f"~{row.speed_ratio:.2f}"
    return f"{interval.low:.2f} – {interval.high:.2f}" if interval.factor > WIDE else f"{row.speed_ratio:.2f}"


def _ratio(row: Row) -> str:
    if row.perplexity_ratio is None or not row.perplexity_ratio_error:
        return shown(row.perplexity_ratio, ".4f")
    return f"{row.perplexity_ratio:.4f} ± {row.perplexity_ratio_error:.4f}"


def shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def columns(document: Mapping[str, Any]) -> list[Column]:
    """The table's columns: the precision, with * on the Pareto front; size; quality if measured; speed."""
    best = front(rows_of(document))
    name: Column = ("precision", lambda row: row.precision + (" *" if row.precision in best else ""))
    return [name, *_SIZE, *(_QUALITY if quality_means_something(document) else []), *_SPEED]


def legend(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(term, meaning) of the columns and marks in the table."""
    present = {heading for heading, _ in columns(document)} | {"*", "~", "disk", "weights", "TTFT"}
    pairs = [(line[:13].strip(), line[13:]) for line in LEGEND.splitlines()]
    return [(term, meaning) for term, meaning in pairs if term in present]


def cells(document: Mapping[str, Any], rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, headings first."""
    return tables.cells(columns(document), rows)
