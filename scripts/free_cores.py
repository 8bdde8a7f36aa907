"""How many cores a host really gives: other work, and limits that no count of CPUs shows, take some."""

import subprocess
import sys
import time

_WORK = "x = 0\nfor i in range(8_000_000): x += i * i"


def free_cores(processes: int) -> float:
    """The cores' worth of computing that ``processes`` busy ones get together, relative to one alone.

    Equal to ``processes`` on a quiet host with as many cores; about 1 where they share one.
    """
    alone = min(_seconds(1) for _ in range(2))
    return round(processes * alone / _seconds(processes), 2)


def _seconds(processes: int) -> float:
    started = time.perf_counter()
    running = [subprocess.Popen([sys.executable, "-S", "-c", _WORK]) for _ in range(processes)]
    for one in running:
        one.wait()
    return time.perf_counter() - started
