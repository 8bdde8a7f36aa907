"""Checks on the loaded model that its architecture can be batched.

Every forward pass gets explicit positions and masks. An architecture that ignores them, or derives its own
from the cache's length (GPT-Neo's local attention, ALiBi), would generate fluent but wrong text.
"""

from random import Random
from typing import Any

import torch

from loaders.errors import CheckpointError, in_short
from loaders.runner import Runner

_LONG, _SHORT = 24, 5  # tokens of the two rows
_FARTHEST = 1024  # longest attention window that the check exceeds
# relative error of logits: rounding makes 0.013 at most (bf16), lost positions 0.5 and more
_TOLERANCE = 0.25


def check_rows(runner: Runner, config: Any, name: str, dtype: torch.dtype) -> None:
    """Compares two rows of different lengths, batched and in chunks, with one pass of each alone.

    Args:
        config: the ``transformers`` configuration.
        name: of the architecture, for the error.
        dtype: of the computation.

    Raises:
        CheckpointError: the results differ, or the forward pass raises.
    """
    try:
        deviation = _difference(runner, _texts(runner, config))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a forward pass may raise anything for arguments that it doesn't expect
        raise CheckpointError(f"{name} can't be batched here ({in_short(error)})") from error
    if deviation >= _TOLERANCE:
        raise CheckpointError(f"{name} can't be batched here: its rows disturb each other")
    if not deviation < _TOLERANCE:
        raise not_numbers(name, dtype)


def check_numbers(runner: Runner, name: str, dtype: torch.dtype) -> None:
    """Computes one token; for runners that need no other check.

    Raises:
        CheckpointError: its logits are not numbers.
    """
    if not runner.score([0]).isfinite().any():
        raise not_numbers(name, dtype)


def not_numbers(name: str, dtype: torch.dtype) -> CheckpointError:
    """The error for logits that are not numbers, by the type of the weights."""
    beyond = " (beyond the range of float16? fp32 and bf16 have more)" if dtype == torch.float16 else ""
    return CheckpointError(f"{name} can't be served: its logits are not numbers{beyond}")


def _texts(runner: Runner, config: Any) -> list[list[int]]:
    window = getattr(config.get_text_config(), "window_size", None)
    beyond = window + _SHORT if isinstance(window, int) and window <= _FARTHEST else 0
    lengths = [min(max(_LONG, beyond), runner.context), min(_SHORT, runner.context)][: runner.slots]
    random = Random(0)
    return [[random.randrange(runner.vocabulary) for _ in range(length)] for length in lengths]


def _difference(runner: Runner, texts: list[list[int]]) -> float:
    """The largest of the rows' relative errors; NaN where logits are."""
    for slot, ids in enumerate(texts):
        for chunk in (ids[: len(ids) // 2], ids[len(ids) // 2 : -1]):
            if chunk:
                runner.prefill(slot, chunk, "none")
    together = runner.decode(range(len(texts)), [ids[-1] for ids in texts]).clone()
    for slot in range(len(texts)):
        runner.free(slot)
    alone = torch.stack([runner.score(ids)[-1] for ids in texts])
    size = (alone - alone.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((together - alone).norm(dim=-1) / size.clamp_min(torch.finfo(size.dtype).tiny)).max())
