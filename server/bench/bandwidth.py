"""The host as a measurement meets it: pinned threads, and how fast its memory is."""

import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from server.host.threads import compute_with, physical_cores

_CPUS = Path("/sys/devices/system/cpu")
_SMALLEST_BUFFER, _TIMES_L3 = 256 * 2**20, 8
_TRIES = 5
_T = TypeVar("_T")


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of the memory, on the threads that compute."""

    copy: float
    """Of a copy: bytes read and bytes written, both counted."""
    read: float
    """Of a sum over a buffer: bytes read."""


def pin(threads: int) -> list[int] | None:
    """Binds this process to as many physical cores as there are threads, and torch to that many threads.

    Returns: the CPUs, or None where the system can't bind a process, or has fewer cores.
    """
    cores = physical_cores()
    compute_with(threads)
    if not hasattr(os, "sched_setaffinity") or threads > len(cores):
        return None
    chosen = cores[:threads]
    for task in os.listdir("/proc/self/task"):  # threads that libraries have started already
        os.sched_setaffinity(int(task), chosen)
    return chosen


def apart(work: Callable[[], _T], threads: int) -> _T:
    """The work's result, from a thread that ends with it.

    A thread that has computed once keeps a team of OpenMP threads as long as it lives. With more of
    those in a process than CPUs, GNU's OpenMP puts idle ones to sleep at once: every team is slower for it.
    """

    def run() -> _T:
        compute_with(threads)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def last_cache_bytes() -> int | None:
    """Size of the largest cache of the first CPU, or None where the system doesn't tell."""
    sizes = []
    for file in _CPUS.glob("cpu0/cache/index*/size"):
        if match := re.fullmatch(r"(\d+)([KM])", file.read_text().strip()):
            sizes.append(int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]])
    return max(sizes, default=None)


class MemorySpeed:
    """Measures the bandwidth of the device's memory with buffers much larger than the caches."""

    def __init__(self, device: str, threads: int) -> None:
        self.threads = threads
        self.buffer_bytes = max(_SMALLEST_BUFFER, _TIMES_L3 * (last_cache_bytes() or 0))
        self._device = device

    def measure(self) -> Bandwidth:
        """The best of a few tries each: what the memory can do, not what it does while others use it."""
        return apart(self._measure, self.threads)

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
