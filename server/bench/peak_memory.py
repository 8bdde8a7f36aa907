"""Memory of this process: what is held, and the most that was since a moment.

On a CPU that is the resident set, of which only Linux tells; on a GPU what torch's allocator has given out.
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
    """What has been taken since it was made, at its highest."""

    def growth(self) -> int | None:
        """Bytes; None where nobody tells."""
        ...


def peak_on(device: str) -> Peak:
    """Of the memory that a model on this device takes."""
    return DevicePeak() if device == "cuda" else PeakMemory()


class DevicePeak:
    """Growth of what torch's allocator has given out on the card."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def growth(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self._before


class PeakMemory:
    """Growth of the resident set since it was made, at its highest (VmHWM − VmRSS at the beginning)."""

    def __init__(self) -> None:
        trim()
        self._known = reset_peak()
        self._before = status_bytes("VmRSS")

    def growth(self) -> int | None:
        """Bytes; None where the system doesn't tell, or can't forget an older peak."""
        peak = status_bytes("VmHWM")
        if not self._known or peak is None or self._before is None:
            return None
        return peak - self._before


def trim() -> None:
    """Gives freed memory back to the system where the C library can: kept, it would hide a growth."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Makes the peak of this process what is resident now; whether it could be done."""
    try:
        (_SELF / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def status_bytes(field: str) -> int | None:
    """A size out of /proc/self/status, such as ``VmRSS`` or ``VmHWM``."""
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", (_SELF / "status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
