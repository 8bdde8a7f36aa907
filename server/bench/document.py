"""All figures as one JSON object: for a file, and for the last line of the output."""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from loaders import kernels
from loaders.base import Checkpoint
from server.bench.bandwidth import Bandwidth
from server.bench.session import Row
from server.host.cpu import cpu_name, last_cache_bytes
from server.host.threads import run_in_own_thread
from server.version import VERSION

_GIGA = 1e9


@dataclass
class Report:
    """The figures measured so far; sections that were not requested are absent."""

    host: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        self.rows.append(row_figures(row))

    def document(self) -> dict[str, Any]:
        return {
            "bitdial": VERSION,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": self.host,
            "model": self.model,
            "settings": self.settings,
            "rows": self.rows,
            **self.sections,
        }

    def line(self) -> str:
        """All of it in one line of JSON."""
        return json.dumps(plain(self.document()), separators=(",", ":"), allow_nan=False)

    def text(self) -> str:
        """All of it as indented JSON."""
        return json.dumps(plain(self.document()), indent=1, allow_nan=False)


def plain(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def row_figures(row: Row) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "precision": row.precision,
        "batch": row.batch,
        "engine": row.engine,
        **asdict(row.figures),
        "weights_bytes": row.weights_bytes,
    }
    if row.ratio is not None:
        figures["bitdial_ratio"] = row.ratio
        figures["bitdial_ratios"] = list(row.ratios)
    if row.same_tokens is not None:
        figures["same_tokens"] = row.same_tokens
    if row.memory is not None:
        figures |= asdict(row.memory)
    if row.floor is not None and row.bandwidth is not None:
        rate, floor = row.figures.decode_tokens_per_second, row.floor
        figures["floor"] = {
            "weight_bytes_per_step": floor.weights_bytes,
            "kv_bytes_per_step": floor.kv_bytes,
            "copy_bytes_per_second": row.bandwidth.copy,
            "read_bytes_per_second": row.bandwidth.read,
            "tokens_per_second": floor.tokens_per_second,
            "share": floor.share(rate),
            "share_of_read": floor.share(rate) * row.bandwidth.copy / row.bandwidth.read,
        }
    return figures


def client_facts(cpus: list[int] | None) -> dict[str, Any]:
    """Facts about the client's machine, if the server's is unknown."""
    return {"client_cpu": cpu_name(), "client_pinned_to": cpus, "client_system": platform.platform()}


def host_facts(
    cpus: list[int] | None, threads: int, bandwidth: Bandwidth, buffer_bytes: int
) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "pinned_to": cpus,
        "last_cache_bytes": last_cache_bytes(),
        "copy_bytes_per_second": bandwidth.copy,
        "read_bytes_per_second": bandwidth.read,
        "bandwidth_buffer_bytes": buffer_bytes,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "kernels": run_in_own_thread(kernels.describe, 1),  # runs them once
    }


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.model_id,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "context_length": checkpoint.context_length,
        "file_bytes": checkpoint.file_bytes,
    }


def introduction(report: Report) -> str:
    """The facts needed to compare the figures with others."""
    host, settings, model = report.host, report.settings, report.model
    pinned = host["pinned_to"]
    where = (
        f"pinned to CPUs {','.join(map(str, pinned))}"
        if pinned
        else "not pinned (more threads than cores, or a system that can't)"
    )
    return (
        f"{model['name']} ({model['architecture']}), {settings['prompt']} prompt tokens, "
        f"{settings['tokens']} generated, {settings['repeat']} repeats, greedy\n"
        f"{host['cpu']}, {host['threads']} threads {where}; kernels: {host['kernels']}\n"
        f"torch {host['torch']}, transformers {host['transformers']}, Python {host['python']}\n"
        f"memory: copy {host['copy_bytes_per_second'] / _GIGA:.1f} GB/s (read + written bytes), "
        f"read {host['read_bytes_per_second'] / _GIGA:.1f} GB/s, "
        f"buffers of {host['bandwidth_buffer_bytes'] / 2**20:.0f} MiB; measured again with every row\n"
    )
