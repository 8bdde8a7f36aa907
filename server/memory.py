"""What memory there is, and what a precision will take of it. Bytes everywhere."""

from typing import Literal

import psutil
import torch

import loaders
from loaders.base import LoadedModel, ModelSpec
from server import cgroups

_MARGIN = 0.9  # of what is free; the rest is for activations and for others


def process_memory() -> dict[str, int | None]:
    """The process's memory, the host's or the container's, and the card's where there is one (else None)."""
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
        figures |= {
            "gpu_allocated_bytes": torch.cuda.memory_allocated(),
            "gpu_reserved_bytes": torch.cuda.memory_reserved(),
            "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
            "gpu_total_bytes": torch.cuda.mem_get_info()[1],
        }
    return figures


def free_bytes(device: Literal["cpu", "cuda"]) -> int:
    """What may still be taken on the device, with a margin."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _host_memory()[1]
    return int(free * _MARGIN)


def _host_memory() -> tuple[int, int]:
    """(total, available) of the host, or of what a container may take of it."""
    host = psutil.virtual_memory()
    limit, left = cgroups.memory() or (host.total, host.available)
    return min(host.total, limit), min(host.available, left)


def needed_bytes(precision: str, spec: ModelSpec) -> int:
    """An estimate of the weights of a precision, from the model's shapes, before it is loaded.

    The KV cache's pages are taken as they are written, on a CPU, and are not counted in.
    """
    return loaders.loader(precision).estimate_bytes(precision, spec)


def used_bytes(model: LoadedModel) -> int:
    """Weights and KV cache of a loaded model, counted."""
    return model.footprint.weights_bytes + model.runner.kv_cache_bytes
