"""Decode time by context length: one row after prompts of several lengths."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loaders.base import LoadedModel
from server.bench.contenders import EngineContender
from server.bench.errors import BenchError
from server.bench.figures import MILLISECONDS
from server.bench.session import floor_bytes, prompts_of
from server.tables import Column

_TOKENS, _FEWEST = 24, 4  # generated at each length
LEGEND = """\
ms a token  one row, after a prompt of that length: median over repeats of the median time between its tokens
KV read     bytes of keys and values that such a step reads ÷ all bytes that it reads"""


@dataclass(frozen=True)
class ContextCost:
    """Decoding one row at one context length."""

    precision: str
    context: int
    """Tokens of the prompt."""
    milliseconds: float
    """From one token to the next."""
    kv_share: float
    """Share of keys and values in the bytes that a step reads."""


COLUMNS: list[Column[ContextCost]] = [
    Column("precision", "", 13, lambda row: row.precision, left=True),
    Column("context", "", 8, lambda row: str(row.context)),
    Column("ms a token", "", 10, lambda row: f"{row.milliseconds:.3f}"),
    Column("KV read", "", 8, lambda row: f"{row.kv_share:.0%}"),
]


def tokens_after(context: int, limit: int) -> int:
    """Number of tokens to generate after a prompt of ``context`` tokens.

    Raises:
        BenchError: the model's context leaves too little room.
    """
    tokens = min(_TOKENS, limit - context)
    if tokens < _FEWEST:
        raise BenchError(f"--contexts {context}: at most {limit - _FEWEST} in a context of {limit}")
    return tokens


async def measure_contexts(
    loaded: LoadedModel, contexts: Sequence[int], repeat: int, threads: int
) -> AsyncIterator[ContextCost]:
    """Yields the cost at every length; closes the model at the end."""
    runner = loaded.runner
    engine = await EngineContender(loaded, threads).start()
    try:
        for context in contexts:
            prompts, tokens = prompts_of(1, context, runner.vocabulary), tokens_after(context, runner.context)
            await engine.run(prompts, tokens)
            runs = [await engine.run(prompts, tokens) for _ in range(repeat)]
            weights, kv = floor_bytes(loaded, context + tokens / 2)
            yield ContextCost(
                loaded.precision,
                context,
                MILLISECONDS * median(median(run.gaps) for run in runs),
                kv / (kv + weights),
            )
    finally:
        await engine.close()


def plot(costs: Sequence[ContextCost], title: str, file: Path) -> str:
    """Draws a line for every precision, as SVG; returns a message about the result."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    for name in dict.fromkeys(cost.precision for cost in costs):
        mine = [cost for cost in costs if cost.precision == name]
        axes.plot([c.context for c in mine], [c.milliseconds for c in mine], marker="o", label=name)
    axes.set(xlabel="context, tokens", ylabel="ms a token, one row", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg")
    return f"plotted to {file.name}"
