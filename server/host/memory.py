"""Free memory, and the memory that precisions need or use. All figures are in bytes."""

from dataclasses import replace
from typing import Literal

import psutil
import torch

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.cuda.memory import cards_free, smallest_cache
from loaders.kv_cache.block_pool import BLOCK_TOKENS
from loaders.runner import DeviceRunner, GrowingRunner, PagedRunner, Runner
from server.host import cgroups

_MARGIN = 0.9  # usable share of the free memory; the rest is for activations and other processes


def process_memory() -> dict[str, int | None]:
    """Memory of the process, of the host or container, and of all GPUs together (None without one)."""
    total, available = _host_memory()
    figures: dict[str, int | None] = {
        "process_rss_bytes": psutil.Process().memory_info().rss,
        "total_bytes": total,
        "available_bytes": available,
        "gpu_allocated_bytes": None,
        "gpu_reserved_bytes": None,
        "gpu_peak_bytes": None,
        "gpu_total_bytes": None,
    }
    if torch.cuda.is_available():
        cards = range(torch.cuda.device_count())
        figures |= {
            "gpu_allocated_bytes": sum(torch.cuda.memory_allocated(card) for card in cards),
            "gpu_reserved_bytes": sum(torch.cuda.memory_reserved(card) for card in cards),
            "gpu_peak_bytes": sum(torch.cuda.max_memory_allocated(card) for card in cards),
            "gpu_total_bytes": sum(torch.cuda.mem_get_info(card)[1] for card in cards),
        }
    return figures


def free_bytes(device: Literal["cpu", "cuda"]) -> int:
    """What can still be allocated on the device, less a margin of 10 %."""
    free = sum(cards_free()) if device == "cuda" else _host_memory()[1]
    return int(free * _MARGIN)


def capacity_bytes(device: Literal["cpu", "cuda"]) -> int:
    """What models may take on the device when nothing else runs, less the same margin as ``free_bytes``."""
    if device == "cuda":
        total = sum(torch.cuda.mem_get_info(card)[1] for card in range(torch.cuda.device_count()))
    else:
        total = _host_memory()[0]
    return int(total * _MARGIN)


def _host_memory() -> tuple[int, int]:
    """(total, available) of the host, or of the container if its limit is lower."""
    host = psutil.virtual_memory()
    limit, left = cgroups.memory() or (host.total, host.available)
    return min(host.total, limit), min(host.available, left)


def needed_bytes(precision: str, spec: ModelSpec) -> int:
    """An estimate for a precision before it is loaded, from the model's shapes.

    On a CPU the KV cache is not included: its pages are allocated when they are written. On a GPU one
    sequence's cache is: it is the minimum to run, and of the rest as many slots are made as fit.
    """
    weights = loaders.loader(precision).estimate_bytes(precision, spec)
    if spec.device == "cpu":
        return weights
    return weights + smallest_cache(spec.checkpoint.config, spec.max_tokens)


def within(budget: int | None, used: int, spec: ModelSpec) -> ModelSpec:
    """``spec`` with the rest of the memory budget as ``room``, which bounds a GPU's KV cache."""
    return spec if budget is None else replace(spec, room=budget - used)


def cache_token_bytes(runner: Runner) -> float:
    """Bytes of one cached token's keys and values."""
    if isinstance(runner, PagedRunner):
        return runner.pool.block_bytes / BLOCK_TOKENS
    known: float | None = getattr(runner, "token_bytes", None)
    return runner.kv_cache_bytes / (runner.slots * runner.context) if known is None else known


def grown_cache_bytes(runner: GrowingRunner, sequences: int, tokens: int) -> int:
    """Bytes of the cache with so many sequences of so many tokens."""
    return round(sequences * (runner.sequence_bytes + runner.token_bytes * tokens))


def full_cache_bytes(runner: Runner) -> int:
    """Bytes of the cache with the whole context in every slot; some runners allocate as sequences grow."""
    if isinstance(runner, GrowingRunner):
        return grown_cache_bytes(runner, runner.slots, runner.context)
    if isinstance(runner, PagedRunner):
        return round(cache_token_bytes(runner) * runner.slots * runner.context)
    return runner.kv_cache_bytes


def working_bytes(model: LoadedModel) -> int:
    """Device memory of a loaded model beside weights and KV cache; 0 on a CPU, where steps free theirs."""
    return model.runner.working_bytes if isinstance(model.runner, DeviceRunner) else 0


def by_kind(model: LoadedModel) -> dict[str, int]:
    """Bytes that a loaded model holds, by kind."""
    return {
        "weights": model.footprint.weights_bytes,
        "kv_cache": model.runner.kv_cache_bytes,
        "working": working_bytes(model),
    }


def fixed_bytes(model: LoadedModel) -> int:
    """``used_bytes`` without a cache in blocks, whose memory is the budget's."""
    kinds = by_kind(model)
    return sum(kinds.values()) - (kinds["kv_cache"] if isinstance(model.runner, PagedRunner) else 0)


def used_bytes(model: LoadedModel) -> int:
    """The sum of ``by_kind``."""
    return sum(by_kind(model).values())
