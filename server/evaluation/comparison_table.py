"""A comparison's figures as text, as data, and as a Markdown table followed by the texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import ServiceError
from server.evaluation.comparison import Compared
from server.tables import NONE, markdown_table

HEADINGS = (
    "precision", "MB", "first token ms", "tokens/s", "prompt perplexity", "mean KL", "max KL", "top-1",
    "differs at token",
)  # fmt: skip


def markdown(reference: str, rows: Mapping[str, Compared | ServiceError]) -> str:
    lines: list[Sequence[str]] = [HEADINGS]
    texts = []
    for name, row in rows.items():
        if isinstance(row, ServiceError):
            lines.append([name, row.message, *[""] * (len(HEADINGS) - 2)])
            continue
        lines.append(cells(row))
        texts.append(f"**{name}**\n\n{_fenced(row.written.text)}")
    about = (
        f"KL divergence (nats) and top-1 agreement are those from {reference} on the prompt's tokens. "
        "Times are of one run, beside whatever else was served: they don't tell which precision is faster."
    )
    return "\n\n".join([markdown_table(lines), about, *texts]) + "\n"


def cells(row: Compared) -> list[str]:
    """A precision's figures, as text."""
    perplexity = row.prompt.prompt_perplexity
    return [
        row.precision,
        f"{row.total_bytes / 1e6:,.1f}",
        f"{row.written.ttft_ms:.1f}",
        f"{row.written.tokens_per_second:.1f}",
        NONE if perplexity is None else f"{perplexity:.5g}",
        f"{row.prompt.mean_kl:.2e}",
        f"{row.prompt.max_kl:.2e}",
        f"{row.prompt.top1_agreement:.2%}",
        NONE if row.first_divergence is None else str(row.first_divergence),
    ]


def figures(row: Compared) -> dict[str, Any]:
    """A precision's figures, as in the response of ``/compare``."""
    return {
        "generated_text": row.written.text,
        "generated_tokens": len(row.written.ids),
        "finish_reason": row.written.finish_reason,
        "memory": {"total_bytes": row.total_bytes},
        "ttft_ms": round(row.written.ttft_ms, 3),
        "tokens_per_second": round(row.written.tokens_per_second, 3),
        "prompt_perplexity": row.prompt.prompt_perplexity,
        "mean_kl": row.prompt.mean_kl,
        "max_kl": row.prompt.max_kl,
        "top1_agreement": row.prompt.top1_agreement,
        "first_divergence": row.first_divergence,
    }


def _fenced(text: str) -> str:
    """The text as a code block, fenced by more backticks than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
