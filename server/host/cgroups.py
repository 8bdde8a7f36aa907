"""Memory and CPU limits of a container on Linux: cgroups, versions 1 and 2.

The host's figures (``/proc/meminfo``, the number of CPUs) don't include these limits, and no call fails when
one is exceeded: the kernel kills the process, or throttles its threads for the rest of every 100 ms period.
A limit applies to all groups below its own, so every group from the process's up to the root is read.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MOUNT, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MEMORY = {  # limit: (usage, page cache in it that the kernel would reclaim)
    "memory.max": ("memory.current", "inactive_file"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}


def memory(mount: Path = _MOUNT, mine: Path = _MINE) -> tuple[int, int] | None:
    """(limit, free bytes below it) of the group with the fewest free bytes; None without a limit."""
    found: list[tuple[int, int]] = []
    for folder in _groups("memory", mount, mine):
        for name, (used, cached) in _MEMORY.items():
            limit, now = _number(folder / name), _number(folder / used)
            # version 1 has a huge number for no limit
            if limit is not None and now is not None and limit < 2**60:
                found.append((limit, max(0, limit - now + _cached(folder, cached))))
    return min(found, key=lambda pair: pair[1], default=None)


def cpus(mount: Path = _MOUNT, mine: Path = _MINE) -> int | None:
    """The CPU quota in whole CPUs, at least 1; None if it is no less than the CPUs in the affinity mask."""
    shares = [share for folder in _groups("cpu", mount, mine) if (share := _cpu_share(folder)) is not None]
    allowed = max(1, math.floor(min(shares))) if shares else None
    return allowed if allowed is not None and allowed < len(os.sched_getaffinity(0)) else None


def _groups(controller: str, mount: Path, mine: Path) -> Iterator[Path]:
    """The folders of the process's group and its ancestors, as far as the mount shows them."""
    try:
        lines = mine.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = mount if number == "0" else mount / controllers.removeprefix("name=")
        # in a container this may be the path on the host, which doesn't exist here
        inside = root / path.lstrip("/")
        yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(root))


def _cpu_share(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (str(_number(folder / f"cpu.cfs_{name}_us") or "max") for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal():
        return int(quota) / int(period)
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # missing, or "max"
        return None


def _cached(folder: Path, name: str) -> int:
    try:
        figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(figures[name])
    except (OSError, ValueError, KeyError):
        return 0
