"""What this host's CPU is, and which of its cores to compute on."""

import os
import platform
import re
from pathlib import Path

from server.host.threads import compute_with, physical_cores

_CPUS = Path("/sys/devices/system/cpu")


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
