"""What memory there is, and what a precision will take of it. Bytes everywhere."""

from dataclasses import replace
from typing import Literal

import psutil
import torch

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.cuda.memory import cards_free, smallest_cache
from loaders.runner import DeviceRunner
from server.host import cgroups

_MARGIN = 0.9  # of what is free; the rest is for activations and for others


def process_memory() -> dict[str, int | None]:
    """The process's memory, the host's or the container's, and the cards' together where there are any."""
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
    """What may still be taken on the device, with a margin."""
    free = sum(cards_free()) if device == "cuda" else _host_memory()[1]
    return int(free * _MARGIN)


def _host_memory() -> tuple[int, int]:
    """(total, available) of the host, or of what a container may take of it."""
    host = psutil.virtual_memory()
    limit, left = cgroups.memory() or (host.total, host.available)
    return min(host.total, limit), min(host.available, left)


def needed_bytes(precision: str, spec: ModelSpec) -> int:
    """An estimate of the weights of a precision, from the model's shapes, before it is loaded.

    On a CPU the KV cache's pages are taken as they are written, and are not counted in. On a GPU the cache of
    one sequence is: with less it can't run, and with more it takes as many slots as fit.
    """
    weights = loaders.loader(precision).estimate_bytes(precision, spec)
    if spec.device == "cpu":
        return weights
    return weights + smallest_cache(spec.checkpoint.config, spec.max_tokens)


def within(budget: int | None, used: int, spec: ModelSpec) -> ModelSpec:
    """What the next precision is loaded with: a GPU's cache is made as large as what is left lets it be."""
    return spec if budget is None else replace(spec, room=budget - used)


def working_bytes(model: LoadedModel) -> int:
    """What a loaded model holds on a device beside weights and KV cache; on a CPU nothing outlasts a step."""
    return model.runner.working_bytes if isinstance(model.runner, DeviceRunner) else 0


def by_kind(model: LoadedModel) -> dict[str, int]:
    """What a loaded model holds, counted."""
    return {
        "weights": model.footprint.weights_bytes,
        "kv_cache": model.runner.kv_cache_bytes,
        "working": working_bytes(model),
    }


def used_bytes(model: LoadedModel) -> int:
    """All of it together."""
    return sum(by_kind(model).values())
