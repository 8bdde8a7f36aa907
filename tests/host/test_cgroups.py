"""A container's limits, from a folder tree like that of Linux."""

import os
from pathlib import Path

import psutil
import pytest

from server.host import cgroups, memory

GIB = 2**30


class Groups:
    """A cgroup tree, and a process's group in it."""

    def __init__(self, folder: Path) -> None:
        self.mount, self.mine = folder / "cgroup", folder / "self"

    def write(self, folder: str, **files: object) -> None:
        """``memory_max=1`` is the file ``memory.max``."""
        place = self.mount / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name.replace("_", ".", 1)).write_text(f"{text}\n")

    def memory(self) -> tuple[int, int] | None:
        return cgroups.memory(self.mount, self.mine)

    def cpus(self) -> int | None:
        return cgroups.cpus(self.mount, self.mine)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return Groups(tmp_path)


def test_a_container_of_version_2(groups: Groups) -> None:
    groups.mine.write_text("0::/\n")
    groups.write(
        ".", memory_max=4 * GIB, memory_current=3 * GIB, cpu_max="250000 100000",
        memory_stat=f"anon {2 * GIB}\ninactive_file {GIB // 2}",
    )  # fmt: skip
    assert groups.memory() == (4 * GIB, GIB + GIB // 2)
    assert groups.cpus() == 2


def test_a_version_1_container_that_sees_its_path_on_the_host(groups: Groups) -> None:
    groups.mine.write_text("5:memory:/docker/4f2\n3:cpu,cpuacct:/docker/4f2\n1:name=systemd:/\n0::/\n")
    groups.write(
        "memory", memory_limit_in_bytes=2 * GIB, memory_usage_in_bytes=GIB,
        memory_stat=f"inactive_file 7\ntotal_inactive_file {GIB // 4}",
    )  # fmt: skip
    groups.write("cpu,cpuacct", cpu_cfs_quota_us=50_000, cpu_cfs_period_us=100_000)
    assert groups.memory() == (2 * GIB, GIB + GIB // 4)
    assert groups.cpus() == 1  # half a CPU is one thread


def test_no_limits(groups: Groups) -> None:
    groups.mine.write_text("5:memory:/\n3:cpu:/\n0::/service\n")
    groups.write("memory", memory_limit_in_bytes=9223372036854771712, memory_usage_in_bytes=GIB)
    groups.write("cpu", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    groups.write("service", memory_max="max", memory_current=GIB, cpu_max="max 100000")
    assert groups.memory() is None
    assert groups.cpus() is None


def test_a_system_without_control_groups(groups: Groups) -> None:
    assert groups.memory() is None
    assert groups.cpus() is None


def test_the_tightest_of_nested_groups_holds(groups: Groups) -> None:
    groups.mine.write_text("0::/pod/container\n")
    groups.write("pod", memory_max=3 * GIB, memory_current=2 * GIB, cpu_max="400000 100000")
    groups.write("pod/container", memory_max=8 * GIB, memory_current=GIB, cpu_max="800000 100000")
    assert groups.memory() == (3 * GIB, GIB)
    assert groups.cpus() == 4


def test_more_cpus_than_there_are_is_no_limit(groups: Groups) -> None:
    groups.mine.write_text("0::/\n")
    groups.write(".", cpu_max="1600000 100000")
    assert groups.cpus() is None


def test_usage_above_the_limit_leaves_no_memory(groups: Groups) -> None:
    groups.mine.write_text("0::/\n")
    groups.write(".", memory_max=GIB, memory_current=GIB + 1)
    assert groups.memory() == (GIB, 0)


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory", lambda: (1_000_000, 1_000))
    assert memory.free_bytes("cpu") == 900
    figures = memory.process_memory()
    assert (figures["total_bytes"], figures["available_bytes"]) == (1_000_000, 1_000)


def test_a_limit_above_the_hosts_memory_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory", lambda: (2**59, 2**59))
    assert memory.process_memory()["total_bytes"] == psutil.virtual_memory().total
