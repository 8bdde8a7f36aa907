"""The C library's heap: while weights are loaded, and after much was needed for a while.

Loading makes and drops a float32 copy of every layer. From glibc's heap such blocks seldom go back to the
system: it raises the size from which a block is mapped by itself to whatever was freed (mallopt(3),
M_MMAP_THRESHOLD), and one small block above keeps all below it. Loading GPT-2 in int8 took 1.35 × the files
and the weights together; with large blocks mapped by themselves it takes 1.0.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_WHILE_LOADING = 1 << 20
_ELSE = 32 << 20  # as far as glibc raises it by itself: a step's tensors are reused, not mapped again

_lock = threading.Lock()
_inside = 0


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Within it, a block of a MiB or more is the system's again once it is freed.

    This holds for the whole process; with any other C library than glibc nothing changes.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def trim() -> None:
    """Gives what is free to the system, of every thread's heap; takes some tens of milliseconds."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _enter(change: int) -> None:
    global _inside
    with _lock:
        _inside += change
        size = _WHILE_LOADING if _inside else _ELSE
        if (libc := _glibc()) is not None:
            libc.mallopt(_MMAP_THRESHOLD, size)
            libc.mallopt(_TRIM_THRESHOLD, 2 * size)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
