"""The number of CPU threads of a forward pass, and how to set it in each thread that computes.

PyTorch keeps the number per thread (it is OpenMP's) and one for the process: the number that any thread has
set last. A thread takes over the latter at its first parallel operation, even if it has set its own before.
So every thread that computes calls ``compute_with`` instead of relying on a default.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from server.host import cgroups

_CPUS = Path("/sys/devices/system/cpu")
_VARIABLE = "OMP_NUM_THREADS"


def resolve(threads: int | None) -> int:
    """``threads``; ``default_threads()`` if None."""
    return default_threads() if threads is None else threads


def default_threads() -> int:
    """``OMP_NUM_THREADS`` if it is set; otherwise one thread per physical core of the affinity mask.

    Limited by a container's CPU quota: more threads use it up by spinning while they wait for throttled ones.
    """
    if (given := _from_environment()) is not None:
        return given
    cores, allowed = len(physical_cores()), cgroups.cpus()
    return cores if allowed is None else min(cores, allowed)


def _from_environment() -> int | None:
    """The first number of the list: the outermost level's. An invalid value is ignored, as OpenMP does."""
    first = os.environ.get(_VARIABLE, "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def physical_cores() -> list[int]:
    """One CPU per physical core of the affinity mask: hyper-threads share their core's execution units."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    first: dict[tuple[str, str], int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        first.setdefault((_topology(cpu, "physical_package_id"), _topology(cpu, "core_id")), cpu)
    return sorted(first.values())


def _topology(cpu: int, what: str) -> str:
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / what).read_text().strip()
    except OSError:
        return f"of cpu {cpu}"  # unknown: counts as a core of its own


def limit_libraries() -> None:
    """Sets ``OMP_NUM_THREADS`` under a CPU quota, for libraries that start threads of their own.

    Called before torch is imported, which reads it once.
    """
    if cgroups.cpus() is not None:
        os.environ.setdefault(_VARIABLE, str(default_threads()))


def compute_with(threads: int) -> None:
    """Sets the number of threads of the calling thread's parallel operations, whatever other threads set."""
    import torch  # late: limit_libraries is called before it is imported

    torch.get_num_threads()  # takes over the process's number now: later it would replace the one set here
    torch.set_num_threads(threads)


_T = TypeVar("_T")


def run_in_own_thread(work: Callable[[], _T], threads: int) -> _T:
    """Runs ``work`` in a new thread, which ends with it, and returns its result.

    A thread that has computed keeps its team of OpenMP threads until it ends. With more of these threads in
    a process than CPUs, GNU's OpenMP lets idle ones sleep at once, which slows every team down.
    """

    def run() -> _T:
        compute_with(threads)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
