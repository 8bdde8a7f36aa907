"""Speed beside quality: one line per engine and precision, for the terminal, Markdown and the JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.quality import Quality
from server.bench.session import Row
from server.bench.table import ratio_text
from server.tables import NONE, Column, cells, markdown_table

_MEGA, _PERCENT = 1e6, 100
_SMALL_KL, _NO_KL = 1e-4, 1e-9  # below them: four decimals show nothing; rounding of float32
_WEIGHTS = "weights      bytes of all weight tensors"
_QUALITIES = """
perplexity   of the text, a token
KL           mean divergence from bitdial's fp32 over the whole vocabulary, nats a token
top-1        tokens after which the most probable next one is fp32's"""
_SPEEDS = """
tok/s        decode, by rows;  ratio: bitdial's decode ÷ this engine's, measured in turn"""


@dataclass(frozen=True)
class Line:
    """An engine in one precision: its rows of all batch sizes, by size, and its quality if it is known."""

    precision: str
    engine: str
    weights_bytes: int | None
    rows: Mapping[int, Row]
    quality: Quality | None

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        found = self.quality
        return {
            "precision": self.precision,
            "engine": self.engine,
            "weights_bytes": self.weights_bytes,
            "decode_tokens_per_second": {
                str(size): row.figures.decode_tokens_per_second for size, row in self.rows.items()
            },
            "bitdial_ratio": {str(size): row.ratio for size, row in self.rows.items()},
            "perplexity": None if found is None else found.perplexity,
            "mean_kl": None if found is None else found.mean_kl,
            "mean_kl_error": None if found is None else found.mean_kl_error,
            "top1_agreement": None if found is None else found.top1_agreement,
        }


def lines(rows: Sequence[Row], qualities: Mapping[tuple[str, str], Quality]) -> list[Line]:
    """One per precision and engine, in the order of ``rows``."""
    grouped: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        grouped.setdefault((row.precision, row.engine), {})[row.batch] = row
    return [
        Line(*key, next(iter(of.values())).weights_bytes, of, qualities.get(key))
        for key, of in grouped.items()
    ]


def columns(found: Sequence[Line]) -> list[Column[Line]]:
    """Those of quality only if any engine's is known."""
    return [
        Column("precision", "", 13, lambda line: line.precision, left=True),
        Column("engine", "", 20, lambda line: line.engine, left=True),
        Column("weights", "MB", 8, lambda line: _text(line.weights_bytes, lambda n: f"{n / _MEGA:.1f}")),
        *(_QUALITY if _has_quality(found) else []),
        *_speeds(sorted({size for line in found for size in line.rows})),
    ]


def legend(found: Sequence[Line]) -> str:
    """Of those columns."""
    return _WEIGHTS + (_QUALITIES if _has_quality(found) else "") + _SPEEDS


def markdown(found: Sequence[Line]) -> str:
    """The same table in Markdown."""
    shown = [(_heading(column), _shown(column)) for column in columns(found)]
    return markdown_table(cells(shown, found))


def _has_quality(found: Sequence[Line]) -> bool:
    return any(line.quality is not None for line in found)


def _text(value: Any, show: Any) -> str | None:
    return None if value is None else show(value)


def _kl(value: float) -> str:
    if value >= _SMALL_KL:
        return f"{value:.4f}"
    return f"{value:.0e}" if value >= _NO_KL else "0"


_QUALITY: list[Column[Line]] = [
    Column("perplexity", "", 10, lambda line: _text(line.quality, lambda found: f"{found.perplexity:.3f}")),
    Column("KL", "nats", 7, lambda line: _text(line.quality, lambda found: _kl(found.mean_kl))),
    Column(
        "top-1",
        "%",
        6,
        lambda line: _text(line.quality, lambda found: f"{_PERCENT * found.top1_agreement:.1f}"),
    ),
]


def _speeds(sizes: Sequence[int]) -> Iterator[Column[Line]]:
    for size in sizes:
        yield Column(f"tok/s {size}", "", 9, lambda line, size=size: _rate(line, size))  # type: ignore[misc]
    for size in sizes:
        yield Column(f"ratio {size}", "×", 8, lambda line, size=size: _ratio(line, size))  # type: ignore[misc]


def _rate(line: Line, size: int) -> str | None:
    row = line.rows.get(size)
    return None if row is None else f"{row.figures.decode_tokens_per_second:.1f}"


def _ratio(line: Line, size: int) -> str | None:
    row = line.rows.get(size)
    return None if row is None else ratio_text(row)


def _heading(column: Column[Line]) -> str:
    return f"{column.name} ({column.unit})" if column.unit not in ("", "×") else column.name


def _shown(column: Column[Line]) -> Any:
    return lambda line: column.value(line) or NONE
