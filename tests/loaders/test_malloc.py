"""Memory that loading needs temporarily is returned to the system."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")

# each large block has a small one above it that stays, so that nothing below can be trimmed
PROGRAM = """
import os, torch, psutil
from contextlib import contextmanager, nullcontext
from loaders.malloc import large_blocks_returned

@contextmanager
def overlapping():
    with large_blocks_returned():
        with large_blocks_returned():
            pass
        yield

def measure(context):
    torch.empty(16 << 20, dtype=torch.uint8).fill_(1)  # freed: from now on glibc keeps such blocks
    resident = lambda: psutil.Process().memory_info().rss
    with context:
        before, kept = resident(), []
        for _ in range(60):
            large = torch.empty(3 << 20, dtype=torch.uint8).fill_(1)
            kept.append((large, torch.ones(20_000)))
        full = resident() - before
        kept = [small for _, small in kept]
        del large
        print(full >> 20, (resident() - before) >> 20, flush=True)

for context in (large_blocks_returned(), nullcontext(), overlapping()):
    if os.fork() == 0:  # each has a heap of its own; the imports take seconds
        measure(context)
        os._exit(0)
    os.wait()
"""
RETURNED, KEPT, OVERLAPPING = range(3)


@pytest.fixture(scope="module")
def mebibytes() -> list[list[int]]:
    """Mebibytes at the peak and after freeing all large blocks, in a process for each context."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    return [[int(word) for word in line.split()] for line in lines]


def test_large_blocks_are_returned_while_loading(mebibytes: list[list[int]]) -> None:
    full, left = mebibytes[RETURNED]
    assert full >= 180
    assert left < 20


def test_large_blocks_stay_without_the_context(mebibytes: list[list[int]]) -> None:
    full, left = mebibytes[KEPT]
    assert left > full / 2


def test_a_finished_load_does_not_affect_another(mebibytes: list[list[int]]) -> None:
    full, left = mebibytes[OVERLAPPING]
    assert full >= 180
    assert left < 20
