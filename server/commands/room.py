"""Whether the default precisions of the models to serve fit: checked before the server starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.commands.command_line import UsageError
from server.settings.server import Settings

if TYPE_CHECKING:
    from server.served_model import Wanted

_REMEDY = (
    "choose another --precision (or PRECISION) as the default, fewer --max-total-tokens, less "
    "--kv-cache-memory or more --memory-budget"
)


def require_room(wanted: Sequence[Wanted]) -> None:
    """Checks the default precision of the first model, and each other model's beside it.

    That one is never unloaded; others make room for each other.

    Raises:
        UsageError: one doesn't fit: the server, or that model, would never be ready.
    """
    first, *others = wanted
    free, kept = _free(first.settings), _needed(first) + _cache(first.settings)
    if kept > free:
        raise UsageError(
            f"no room for {_title(first, wanted)}: it needs {kept} bytes, {free} are free; {_REMEDY}"
        )
    for other in others:
        if (needed := kept + _needed(other)) > free:
            raise UsageError(
                f"no room for {_title(other, wanted)} beside {_title(first, wanted)}: they need {needed} "
                f"bytes, {free} are free; {_REMEDY}, or fewer --models"
            )


def _free(settings: Settings) -> int:
    from server.host import memory  # late: help and usage must not wait for torch

    free = memory.free_bytes(settings.resolved_device())
    return free if settings.memory_budget is None else min(free, settings.memory_budget)


def _needed(model: Wanted) -> int:
    from server.host import memory

    settings = model.settings
    return memory.needed_bytes(settings.precision, settings.spec(model.open(), settings.max_batch_size))


def _cache(settings: Settings) -> int:
    return (settings.kv_cache_memory or 0) if settings.resolved_device() == "cpu" else 0


def _title(model: Wanted, wanted: Sequence[Wanted]) -> str:
    precision = model.settings.precision
    return precision if len(wanted) == 1 else f"{model.name}:{precision}"
