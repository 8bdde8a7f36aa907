"""Facts about the GPU and the host."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loaders.base import Checkpoint
from server.bench import document as reports
from server.bench.bandwidth import MemorySpeed
from server.bench.document import Report
from server.bench.gpu.options import Options
from server.host.cpu import cpu_name

_GIGA = 1e9


def card_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {cpu_name()}"


def new_report(options: Options, checkpoint: Checkpoint, speed: MemorySpeed) -> Report:
    """A report; measures the memory bandwidth for the floors."""
    host = reports.host_facts(None, speed.threads, speed.measure(), speed.buffer_bytes)
    host |= {"device": options.device, "card": _card() if options.device == "cuda" else None}
    host |= {name: _version(name) for name in ("bitsandbytes", "accelerate")}
    shown = {
        "quick": options.quick,
        "seconds": options.seconds,
        "parts": options.parts,
        "precisions": options.precisions,
        "made": options.model is None,
    }
    return Report(host, reports.model_facts(checkpoint), shown)


def introduction(report: Report) -> str:
    host, card = report.host, report.host["card"]
    what = (
        f"{card['name']}, {card['memory_bytes'] / _GIGA:.0f} GB, CUDA {card['cuda']}" if card else host["cpu"]
    )
    return (
        f"{what}\n"
        f"torch {host['torch']}, transformers {host['transformers']}, bitsandbytes {host['bitsandbytes']}, "
        f"Python {host['python']}; {host['cpu']}\n"
        f"memory: copy {host['copy_bytes_per_second'] / _GIGA:.0f} GB/s (read + written bytes), "
        f"read {host['read_bytes_per_second'] / _GIGA:.0f} GB/s\n"
    )


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "cards": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
