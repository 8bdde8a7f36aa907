"""The table of ``bitdial bench``: its columns, their legend, and a warning where the host was noisy."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from server.bench.session import Row
from server.tables import Column, Table
from server.terminal import folded, say, terminal_width

_R = TypeVar("_R")
_MEGA = 1e6
_NOISY = 0.25  # spread above which a host is too noisy for its ratios to be relied on


def _peak(row: Row) -> str | None:
    peak = row.memory.peak_growth_bytes if row.memory else None
    return None if peak is None else f"{peak / _MEGA:.0f}"


COLUMNS: list[Column[Row]] = [
    Column("precision", "", 13, lambda row: row.precision, left=True),
    Column("rows", "", 4, lambda row: str(row.batch)),
    Column("engine", "", 20, lambda row: row.engine, left=True),
    Column("prefill", "tok/s", 8, lambda row: f"{row.figures.prefill_tokens_per_second:.0f}"),
    Column("decode", "tok/s", 8, lambda row: f"{row.figures.decode_tokens_per_second:.1f}"),
    Column("spread", "%", 6, lambda row: f"{row.figures.spread:.0%}".rstrip("%")),
    Column("TTFT", "ms", 7, lambda row: f"{row.figures.ttft_ms:.1f}"),
    Column("ITL p50", "ms", 7, lambda row: f"{row.figures.inter_token_p50_ms:.2f}"),
    Column("ITL p99", "ms", 7, lambda row: f"{row.figures.inter_token_p99_ms:.2f}"),
    Column("weights", "MB", 7, lambda row: f"{row.weights_bytes / _MEGA:.1f}" if row.weights_bytes else None),
    Column("KV", "MB", 6, lambda row: f"{row.memory.kv_cache_bytes / _MEGA:.0f}" if row.memory else None),
    Column("peak", "+MB", 5, _peak),
    Column("floor", "tok/s", 7, lambda row: f"{row.floor.tokens_per_second:.0f}" if row.floor else None),
    Column("of it", "%", 5, lambda row: f"{_share(row):.0%}".rstrip("%") if row.floor else None),
    Column("same", "%", 4, lambda row: None if row.same_tokens is None else f"{100 * row.same_tokens:.0f}"),
    Column("ratio", "×", 6, lambda row: ratio_text(row)),
]

LEGEND = """\
prefill   rows × prompt tokens ÷ time until every row has its first token, in runs of one token
decode    tokens ÷ time, while all rows decode: from the last row's first token to the first row's end
spread    of the decode rates: (largest − smallest) ÷ median; every rate is the median over the repeats
TTFT      time to first token: median over rows, all submitted at once;  ITL: time between a row's tokens
weights   bytes of the live tensors;  KV: of the cache for all slots, pages of it taken as they are written
peak      largest resident set after loading and running (VmHWM) − the one before loading
floor     rows ÷ ((weight bytes a step reads + KV bytes it reads at the mean context) ÷ copy bandwidth)
of it     decode ÷ floor; above 100 where weights fit the caches or memory reads faster than it copies
same      greedy tokens that equal bitdial's, each row up to its first difference (expected in fp32 only)
ratio     bitdial's decode ÷ this engine's;  ?: above 1 in one repeat, below in another"""


def ratio_text(row: Row) -> str | None:
    """bitdial's decode rate ÷ the row's; None for bitdial itself."""
    if row.ratio is None:
        return None
    doubtful = bool(row.ratios) and min(row.ratios) <= 1 <= max(row.ratios)
    return f"{row.ratio:.2f}{'?' if doubtful else ''}"


def _share(row: Row) -> float:
    assert row.floor is not None
    return row.floor.share(row.figures.decode_tokens_per_second)


WHOLE = Table(COLUMNS, 3, None)
"""All columns, whatever the terminal's width."""


class PrintedTable(Generic[_R]):
    """Prints each row as it is measured; the constructor prints the heading.

    Args:
        keys: the first so many columns name the row.
    """

    def __init__(self, columns: Sequence[Column[_R]], keys: int, legend: str) -> None:
        self._table, self._legend = Table(columns, keys, terminal_width()), legend
        self.rows: list[_R] = []
        say(self._table.heading())

    def add(self, row: _R) -> None:
        self.rows.append(row)
        say(self._table.line(row))

    def end(self) -> None:
        """Prints the columns that did not fit, and the legend."""
        if rest := self._table.rest(self.rows):
            say(f"\n{rest}")
        say(f"\n{folded(self._legend)}\n")


def warning(rows: Sequence[Row]) -> str | None:
    """A warning if the rates of a row differ widely between repeats; else None."""
    worst = max(rows, key=lambda row: row.figures.spread, default=None)
    if worst is None or worst.figures.spread <= _NOISY:
        return None
    return (
        f"This host was too noisy: the decode rates of a row lay up to {worst.figures.spread:.0%} apart "
        f"({worst.engine}, {worst.precision}, {worst.batch} rows).\n"
        "Of rates and ratios that differ by less nothing follows; measure again on an idle host, "
        "with a larger --repeat."
    )
