"""The CPU's name and cache size; pinning to physical cores."""

import os
import platform
import re
from pathlib import Path

from server.host.threads import compute_with, physical_cores

_CPUS = Path("/sys/devices/system/cpu")


def pin(threads: int) -> list[int] | None:
    """Sets torch's threads, and pins the process to one physical core per thread.

    Returns: the CPUs; None, and nothing is pinned, if the system has no affinity or fewer cores.
    """
    cores = physical_cores()
    compute_with(threads)
    if not hasattr(os, "sched_setaffinity") or threads > len(cores):
        return None
    chosen = cores[:threads]
    for task in os.listdir("/proc/self/task"):  # includes threads that libraries have started
        os.sched_setaffinity(int(task), chosen)
    return chosen


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def last_cache_bytes() -> int | None:
    """Size of the largest cache of CPU 0; None if the system doesn't report it."""
    sizes = []
    for file in _CPUS.glob("cpu0/cache/index*/size"):
        if match := re.fullmatch(r"(\d+)([KM])", file.read_text().strip()):
            sizes.append(int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]])
    return max(sizes, default=None)
