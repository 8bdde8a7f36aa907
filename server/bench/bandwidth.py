"""Memory bandwidth of the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from server.host.cpu import last_cache_bytes
from server.host.threads import run_in_own_thread

_SMALLEST_BUFFER, _TIMES_L3 = 256 * 2**20, 8
_TRIES = 5


@dataclass(frozen=True)
class Bandwidth:
    """Memory bandwidth on the compute threads, in bytes per second."""

    copy: float
    """Of a copy, counting bytes read and bytes written."""
    read: float
    """Of a sum over a buffer: bytes read."""


class MemorySpeed:
    """Measures the bandwidth of the device's memory with buffers much larger than the caches."""

    def __init__(self, device: str, threads: int) -> None:
        self.threads = threads
        self.buffer_bytes = max(_SMALLEST_BUFFER, _TIMES_L3 * (last_cache_bytes() or 0))
        self._device = device

    def measure(self) -> Bandwidth:
        """The best of a few tries each: the capacity of the memory, without other processes' share."""
        return run_in_own_thread(self._measure, self.threads)

    def _measure(self) -> Bandwidth:
        source = torch.ones(self.buffer_bytes // 4, device=self._device)
        target = torch.zeros_like(source)
        return Bandwidth(
            copy=2 * self.buffer_bytes / self._best(lambda: target.copy_(source)),
            read=self.buffer_bytes / self._best(lambda: source.sum()),
        )

    def _best(self, work: Callable[[], object]) -> float:
        work()
        return min(self._seconds(work) for _ in range(_TRIES))

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def middle(bandwidths: list[Bandwidth]) -> Bandwidth:
    """The median of each figure."""
    return Bandwidth(median(b.copy for b in bandwidths), median(b.read for b in bandwidths))
