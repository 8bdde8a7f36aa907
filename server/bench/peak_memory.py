"""Memory of this process: current, and its peak since a moment.

On a CPU the resident set, which only Linux reports; on a GPU the memory allocated by torch.
"""

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

_SELF = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs


class Peak(Protocol):
    """Peak memory growth since construction."""

    def growth(self) -> int | None:
        """Bytes; None if unknown."""
        ...


def peak_on(device: str) -> Peak:
    """The ``Peak`` of the memory that models on this device use."""
    return DevicePeak() if device == "cuda" else PeakMemory()


class DevicePeak:
    """Growth of the memory allocated by torch on the GPU."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def growth(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self._before


class PeakMemory:
    """Growth of the peak resident set: VmHWM − VmRSS at construction."""

    def __init__(self) -> None:
        trim()
        self._was_reset = reset_peak()
        self._before = status_bytes("VmRSS")

    def growth(self) -> int | None:
        """Bytes; None if the system doesn't report it, or can't reset the peak."""
        peak = status_bytes("VmHWM")
        if not self._was_reset or peak is None or self._before is None:
            return None
        return peak - self._before


def trim() -> None:
    """Returns freed memory to the system if the C library can: kept memory would hide growth."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Resets this process's peak to the current resident set; returns whether that worked."""
    try:
        (_SELF / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def status_bytes(field: str) -> int | None:
    """A size from /proc/self/status, such as ``VmRSS`` or ``VmHWM``."""
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", (_SELF / "status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
