"""How many CPU threads a forward pass takes, and how a thread comes to compute with that many.

PyTorch keeps the number for every thread (it is OpenMP's), and beside that one for the process: the number
that any thread has set last. A thread gets the latter at its first parallel operation, even if it has set its
own before; so a thread that computes calls ``compute_with`` and relies on no default.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from server.host import cgroups

_CPUS = Path("/sys/devices/system/cpu")
_VARIABLE = "OMP_NUM_THREADS"


def resolve(threads: int | None) -> int:
    """The given number; as many as ``default_threads`` if None."""
    return default_threads() if threads is None else threads


def default_threads() -> int:
    """``OMP_NUM_THREADS`` if it is set; otherwise one thread for every physical core.

    Only cores that this process may run on count (its affinity mask), and no more of them than a container's
    CPU quota is worth: threads beyond it use it up while they wait for those that have none left.
    """
    cores, allowed = len(physical_cores()), cgroups.cpus()
    return _from_environment() or (cores if allowed is None else min(cores, allowed))


def _from_environment() -> int | None:
    """The first number of a list is that of the outermost level. Nonsense is ignored, as OpenMP does."""
    first = os.environ.get(_VARIABLE, "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def physical_cores() -> list[int]:
    """One CPU of every physical core that this process may run on: hyper-threads share what computes."""
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
        return f"of cpu {cpu}"  # unknown: taken for a core of its own


def limit_libraries() -> None:
    """Sets ``OMP_NUM_THREADS`` under a CPU quota, for whatever starts threads of its own.

    To be called before torch is imported, which reads it once.
    """
    if cgroups.cpus() is not None:
        os.environ.setdefault(_VARIABLE, str(default_threads()))


def compute_with(threads: int) -> None:
    """From now on the calling thread's parallel operations take that many, whatever other threads set."""

    torch.get_num_threads()  # takes the process's number, which would replace the thread's own later
    torch.set_num_threads(threads)


_T = TypeVar("_T")


def run_in_own_thread(work: Callable[[], _T], threads: int) -> _T:
    """The work's result, from a thread that ends with it.

    A thread that has computed once keeps a team of OpenMP threads as long as it lives. With more of
    those in a process than CPUs, GNU's OpenMP puts idle ones to sleep at once: every team is slower for it.
    """

    def run() -> _T:
        compute_with(threads)
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
