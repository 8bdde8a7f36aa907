"""Performance targets, evaluated on the measured rows."""

from collections.abc import Iterator
from typing import Any

from server.bench.gpu.rivals import CONTINUOUS, GENERATE
from server.bench.session import Row

GENERATE_TIMES, CONTINUOUS_TIMES, KERNEL_SHARE, TOKENS = 5.0, 3.0, 0.6, 1500.0


def judged(rows: list[tuple[str, Row]], kernels: list[dict[str, Any]], small: str) -> list[dict[str, Any]]:
    """One entry for every precision and target with figures.

    Args:
        kernels: figures of the steps' kernels.
        small: name of the model of the absolute target.
    """
    return [*_ratios(rows), *_shares(kernels), *_rates(rows, small)]


def line(entry: dict[str, Any]) -> str:
    met = "reached" if entry["reached"] else "NOT REACHED"
    return (
        f"{entry['model']:<9} {entry['precision']:<5} batch {entry['batch']:>2}  {entry['target']:<44} "
        f"{entry['figure']:>9.2f}  {met}"
    )


def _ratios(rows: list[tuple[str, Row]]) -> Iterator[dict[str, Any]]:
    for model, row in rows:
        if row.ratio is None:
            continue
        if row.engine == GENERATE and row.batch == 1:
            yield _entry(model, row, f"× generate, ≥ {GENERATE_TIMES:g}", row.ratio, GENERATE_TIMES)
        if row.engine == CONTINUOUS and row.batch == 64:
            text = f"× continuous batching, ≥ {CONTINUOUS_TIMES:g}"
            yield _entry(model, row, text, row.ratio, CONTINUOUS_TIMES)


def _shares(kernels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in kernels:
        if (share := step.get("share_of_kernels")) is not None:
            yield {
                **{key: step[key] for key in ("model", "precision", "batch")},
                "target": f"share of the kernels' time, ≥ {KERNEL_SHARE:g}",
                "figure": share,
                "reached": share >= KERNEL_SHARE,
            }


def _rates(rows: list[tuple[str, Row]], small: str) -> Iterator[dict[str, Any]]:
    for model, row in rows:
        if (model, row.engine, row.batch) == (small, "bitdial", 1):
            rate = row.figures.decode_tokens_per_second
            yield _entry(model, row, f"tokens a second, ≥ {TOKENS:g}", rate, TOKENS)


def _entry(model: str, row: Row, target: str, figure: float, least: float) -> dict[str, Any]:
    return {
        "model": model,
        "precision": row.precision,
        "batch": row.batch,
        "target": target,
        "figure": figure,
        "reached": figure >= least,
    }
