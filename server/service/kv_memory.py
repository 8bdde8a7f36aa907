"""The memory that the KV caches of all precisions may take together, and what they take."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.kv_cache.budget import KVBudget
from loaders.runner import PagedRunner
from server.host import memory
from server.settings.server import Settings

_SHARE = 0.5  # of what is free beside the weights of the start-up precisions; others may follow
_LEAST_SHARE = 0.25  # of what is free beside the default ones', where not all of them fit
_log = logging.getLogger(__name__)
WeightsFirst = Callable[[], Sequence[tuple[ModelSpec, Sequence[str]]]]


class KVMemory:
    """One per app. Caches that are no blocks of ``PagedRunner`` are not part of it.

    Args:
        weights_first: each model's spec, and its precisions that are loaded at the start, the default first.
    """

    def __init__(self, settings: Settings, weights_first: WeightsFirst) -> None:
        self._settings, self._weights_first = settings, weights_first
        self._budget: KVBudget | None = None

    async def within(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the budget, whose limit is set before the first load; unchanged on a GPU."""
        if spec.device != "cpu":
            return spec
        if self._budget is None:
            limit, why = await asyncio.to_thread(_limit, self._settings, self._weights_first())
            self._budget = KVBudget(limit)
            _log.info("KV caches of all precisions: at most %d bytes (%s)", limit, why)
        return replace(spec, kv_budget=self._budget)

    def used_bytes(self, models: Sequence[LoadedModel]) -> int:
        """Bytes of loaded models; their caches in blocks count with all that they may take."""
        return sum(map(memory.fixed_bytes, models)) + (self._limit_of(models) or 0)

    def uncommitted_bytes(self, models: Sequence[LoadedModel]) -> int:
        """What caches in blocks may still take of the free memory."""
        limit = self._limit_of(models)
        return 0 if limit is None or self._budget is None else limit - self._budget.committed

    def figures(self) -> dict[str, Any] | None:
        """For ``/stats``: bytes for all precisions; None on a GPU and before the first load."""
        if self._budget is None:
            return None
        with self._budget.lock:
            used, committed = self._budget.used, self._budget.committed
        return {"limit_bytes": self._budget.limit, "used_bytes": used, "committed_bytes": committed}

    def _limit_of(self, models: Sequence[LoadedModel]) -> int | None:
        paged = any(isinstance(model.runner, PagedRunner) for model in models)
        return self._budget.limit if paged and self._budget is not None else None


def _limit(settings: Settings, first: Sequence[tuple[ModelSpec, Sequence[str]]]) -> tuple[int, str]:
    """Bytes, and why: ``KV_CACHE_MEMORY``, or a share of the memory that is free or of ``MEMORY_BUDGET``.

    Weights are estimated from the models' shapes.
    """
    if settings.kv_cache_memory is not None:
        return settings.kv_cache_memory, "KV_CACHE_MEMORY"
    free = memory.free_bytes(settings.resolved_device())
    if settings.memory_budget is not None:
        free = min(free, settings.memory_budget)
    weights = [
        [memory.needed_bytes(name, spec) for name in names if loaders.offered(name, spec).ok]
        for spec, names in first
    ]
    beside_all = free - sum(map(sum, weights))
    limit = int(max(_SHARE * beside_all, _LEAST_SHARE * (free - _defaults(free, weights)), 0))
    return limit, f"by default a share of the {free} bytes that are free"


def _defaults(free: int, weights: Sequence[Sequence[int]]) -> int:
    """Bytes of the models' default precisions: of all together or, where they don't fit, of the server's
    default one and the largest other, since the others make room for each other."""
    first, *others = [next(iter(of_model), 0) for of_model in weights]
    together = first + sum(others)
    return together if together < free else first + max(others, default=0)


def blocks_of(model: LoadedModel, preemptions: int) -> dict[str, Any] | None:
    """For ``/stats``: one model's blocks and its prefix cache; None where its slots are whole."""
    if not isinstance(model.runner, PagedRunner):
        return None
    stats = model.runner.pool.stats()
    return {
        "blocks": stats.blocks,
        "block_bytes": stats.block_bytes,
        "used_blocks": stats.used,
        "cached_blocks": stats.cached,
        "usage": round(stats.used / stats.blocks, 4),
        "queried_tokens": stats.queried_tokens,
        "hit_tokens": stats.hit_tokens,
        "hit_rate": round(stats.hit_tokens / stats.queried_tokens, 4) if stats.queried_tokens else None,
        "evictions": stats.evictions,
        "preemptions": preemptions,
    }
