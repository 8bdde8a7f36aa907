"""Tables of quality and of layers' errors on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loaders.base import Footprint
from loaders.quality import Quality
from server.tables import NONE, aligned, cells
from server.terminal import folded, terminal_width

if TYPE_CHECKING:
    from loaders.layer_errors import LayerReport

Column = tuple[str, Callable[[Any], str]]
"""A heading, and a row's text."""

QUALITY: list[Column] = [
    ("precision", lambda row: row.quality.precision),
    ("MB", lambda row: f"{row.footprint.weights_bytes / 1e6:,.1f}"),
    ("bits", lambda row: f"{row.footprint.bits_per_weight:.2f}"),
    ("perplexity", lambda row: f"{row.quality.perplexity:.5g}"),
    ("bits/byte", lambda row: f"{row.quality.bits_per_byte:.4f}"),
    ("ratio", lambda row: f"{row.quality.perplexity_ratio:.5f}"),
    ("±", lambda row: _maybe(row.quality.perplexity_ratio_error, ".5f")),
    ("mean KL", lambda row: f"{row.quality.mean_kl:.2e}"),
    ("median KL", lambda row: f"{row.quality.median_kl:.2e}"),
    ("99 % KL", lambda row: f"{row.quality.p99_kl:.2e}"),
    ("top-1", lambda row: f"{row.quality.top1_agreement:.2%}"),
    ("RMS Δp", lambda row: f"{row.quality.rms_delta_p:.3%}"),
    ("same", lambda row: NONE if row.quality.greedy is None else f"{row.quality.greedy.mean_tokens:.1f}"),
    ("s", lambda row: f"{row.quality.seconds:.1f}"),
]
LEGEND = """\
bits      of memory per parameter
ratio ±   perplexity ÷ fp32's, and its standard error (paired differences)
KL        divergence from fp32's distribution, nats per token
top-1     the same most probable token;  s: seconds of the passes
RMS Δp    root mean square difference of the true token's probability
same      tokens that greedy continuations share with fp32's before they diverge"""
LAYERS: list[Column] = [
    ("layer", lambda layer: layer.name),
    ("before", lambda layer: layer.kind_before),
    ("after", lambda layer: layer.kind_after),
    ("format", lambda layer: layer.format),
    ("shape", lambda layer: f"{layer.shape[0]} × {layer.shape[1]}"),
    ("bytes", lambda layer: f"{layer.nbytes:,}" if layer.shared_with is None else "shared"),
    ("bits", lambda layer: f"{layer.bits_per_weight:.2f}"),
    ("error", lambda layer: _maybe(layer.relative_error, ".3%")),
    ("max", lambda layer: _maybe(layer.max_error, ".2e")),
    ("SQNR dB", lambda layer: _maybe(layer.sqnr_db, ".1f")),
]


def quality_lines(rows: Sequence[Row], *, with_models: bool = False) -> list[str]:
    """A row for each precision, named by its model too or not, and what the columns are."""
    named: Column = ("model:precision", lambda row: row.label)
    columns = [named, *QUALITY[1:]] if with_models else QUALITY
    return [*aligned(cells(columns, rows), terminal_width()), "", folded(LEGEND)]


def layer_lines(report: LayerReport, label: str | None = None) -> list[str]:
    """A summary, a row for each matrix, and why some were kept unquantized.

    Args:
        label: what the summary calls it; its precision if None.
    """
    reasons: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.reason is not None:
            reasons.setdefault(layer.reason, []).append(layer.name)
    return [
        f"{label or report.precision}: {report.quantized_share:.1%} of the linear weights quantized",
        *aligned(cells(LAYERS, report.layers), terminal_width()),
        *(folded(f"kept, because {reason}: {_some(names)}") for reason, names in reasons.items()),
    ]


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _maybe(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


@dataclass(frozen=True)
class Row:
    """One precision's figures.

    Args:
        model: its name.
    """

    model: str
    quality: Quality
    footprint: Footprint
    layers: LayerReport | None

    @property
    def label(self) -> str:
        return f"{self.model}:{self.quality.precision}"

    def as_dict(self, layers: bool) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "model": self.model,
            **asdict(self.quality),
            "weights_bytes": self.footprint.weights_bytes,
            "bits_per_weight": self.footprint.bits_per_weight,
        }
        if self.layers is not None:
            proof = asdict(self.layers)
            figures["quantized_share"] = proof["quantized_share"]
            figures["warning"] = proof["warning"]
            if layers:
                figures["layers"] = proof["layers"]
        return figures
