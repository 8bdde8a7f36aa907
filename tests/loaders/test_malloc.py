"""Memory that loading needs temporarily is returned to the system."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")

# each large block has a small one above it that stays, so that nothing below can be trimmed
PROGRAM = """
import torch, psutil
from contextlib import contextmanager, nullcontext
from loaders.malloc import large_blocks_returned

@contextmanager
def overlapping():
    with large_blocks_returned():
        with large_blocks_returned():
            pass
        yield

torch.empty(16 << 20, dtype=torch.uint8).fill_(1)  # freed: from now on glibc keeps such blocks
resident = lambda: psutil.Process().memory_info().rss
with {context}:
    before, kept = resident(), []
    for _ in range(60):
        large = torch.empty(3 << 20, dtype=torch.uint8).fill_(1)
        kept.append((large, torch.ones(20_000)))
    full = resident() - before
    kept = [small for _, small in kept]
    del large
    print(full >> 20, (resident() - before) >> 20)
"""


def mebibytes(context: str) -> list[int]:
    """Mebibytes at the peak and after freeing all large blocks, in a separate process."""
    program = PROGRAM.format(context=context)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_large_blocks_are_returned_while_loading() -> None:
    full, left = mebibytes("large_blocks_returned()")
    assert full >= 180
    assert left < 20


def test_large_blocks_stay_without_the_context() -> None:
    full, left = mebibytes("nullcontext()")
    assert left > full / 2


def test_a_finished_load_does_not_affect_another() -> None:
    full, left = mebibytes("overlapping()")
    assert full >= 180
    assert left < 20
