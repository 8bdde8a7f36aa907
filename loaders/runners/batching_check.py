"""Checks on the loaded model that its architecture can be batched, and that its logits are numbers.

Every forward pass gets explicit positions and masks. An architecture that ignores them, or derives its own
from the cache's length (GPT-Neo's local attention, ALiBi), would generate fluent but wrong text. The check
computes in float32, where only lost positions and masks make a difference.
"""

from random import Random
from typing import Any

import torch
from torch import Tensor

from loaders.errors import CheckpointError, in_short
from loaders.runner import Runner

_LONG, _SHORT = 24, 5  # tokens of the two rows
_NEAR = 2  # tokens after the last chunk begins: a recurrence may soon forget what it lost there
_FARTHEST = 1024  # longest attention window that the check exceeds
ROUNDING = 1e-4  # relative error of logits: float32 makes 1e-5, states in 16 bits more
_TOLERANCE = 0.005  # lost positions make 0.5 and more


def check_rows(runner: Runner, config: Any, name: str) -> None:
    """Compares two rows of different lengths, batched and in chunks, with one pass over whole texts.

    ``check_numbers`` checks the arithmetic.

    Args:
        runner: over a model in ``full_precision``, with empty slots.
        config: the ``transformers`` configuration.
        name: of the architecture, for the error.

    Raises:
        CheckpointError: the results differ, or the forward pass raises.
    """
    deviation = _deviation(runner, config, f"{name} can't be batched here")
    if deviation >= _TOLERANCE:  # not of NaN, which check_numbers reports
        raise CheckpointError(f"{name} can't be batched here: its rows disturb each other")


def check_sequences(runner: Runner, config: Any, name: str) -> float:
    """``check_rows`` for a runner that computes each sequence in passes of its own; returns the deviation.

    It finds models that aren't causal, whose cache is incomplete, or whose modules hold state.

    Raises:
        CheckpointError: the results differ, or the forward pass raises.
    """
    deviation = _deviation(runner, config, f"{name} can't be served here")
    if deviation >= _TOLERANCE:
        raise CheckpointError(
            f"{name} can't be served here: token by token it computes other logits than in one pass"
        )
    return deviation


def _deviation(runner: Runner, config: Any, failed: str) -> float:
    try:
        return _difference(runner, _texts(runner, config))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a forward pass may raise anything for arguments that it doesn't expect
        raise CheckpointError(f"{failed} ({in_short(error)})") from error


def check_numbers(runner: Runner, name: str, dtype: torch.dtype) -> None:
    """Scores a short text, in the arithmetic that serves.

    Args:
        dtype: of the weights.

    Raises:
        CheckpointError: some logits are not numbers.
    """
    if not runner.score(_text(runner, _LONG)).isfinite().any(-1).all():
        beyond = " (beyond the range of float16? fp32 and bf16 have more)" if dtype == torch.float16 else ""
        raise CheckpointError(f"{name} can't be served: its logits are not numbers{beyond}")


def _text(runner: Runner, length: int) -> list[int]:
    random = Random(0)
    return [random.randrange(runner.vocabulary) for _ in range(min(length, runner.context))]


def _texts(runner: Runner, config: Any) -> list[list[int]]:
    """A long text and, for a second slot, the start of its reverse."""
    window = getattr(config.get_text_config(), "window_size", None)
    beyond = window + _SHORT if isinstance(window, int) and window <= _FARTHEST else 0
    long = _text(runner, max(_LONG, beyond))
    return [long, long[::-1]][: runner.slots]


def _difference(runner: Runner, texts: list[list[int]]) -> float:
    """The largest of the rows' relative errors; NaN where logits are.

    Few passes, since in float32 each converts every weight: the rows' references come from one.
    """
    rows = [texts[0], *(text[:_SHORT] for text in texts[1:])]
    half, end = len(rows[0]) // 2, len(rows[0]) - 1
    near = max(half, end - _NEAR)
    chunks = [(0, rows[0][:half]), (0, rows[0][half:near]), (0, rows[0][near:end])]
    for ids in rows[1:]:
        runner.prefill(1, ids[:1])  # a pass of one token may be taken for a step
        chunks.append((1, ids[1:-1]))
    for slot, chunk in chunks:
        if chunk:
            runner.prefill(slot, chunk, "none")
    together = runner.decode(range(len(rows)), [ids[-1] for ids in rows]).clone()
    for slot in range(len(rows)):
        runner.free(slot)
    alone = _last(runner.score_together(texts, len(texts[0])), rows)
    size = (alone - alone.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((together - alone).norm(dim=-1) / size.clamp_min(torch.finfo(size.dtype).tiny)).max())


def _last(logits: Tensor, rows: list[list[int]]) -> Tensor:
    """(rows, vocabulary) of the (rows, tokens, vocabulary) logits: those after each row's last token."""
    return torch.stack([found[len(ids) - 1] for found, ids in zip(logits, rows, strict=True)])
