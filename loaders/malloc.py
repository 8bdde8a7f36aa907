"""glibc's heap: returns large blocks to the system while weights are loaded, and trims on request.

Loading allocates and frees a float32 copy of every layer. glibc's heap seldom returns such blocks to the
system: it raises the threshold above which a block is mapped separately to the size of a freed block
(mallopt(3), M_MMAP_THRESHOLD), and one small block keeps the memory below it. The peak of loading GPT-2 in
int8 was 1.35 × the files and the weights together; with large blocks mapped separately it is 1.0 ×.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_WHILE_LOADING = 1 << 20
_ELSE = 32 << 20  # glibc's own maximum: tensors of a step are reused, not mapped again

_lock = threading.Lock()
_inside = 0


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Within this context, freeing a block of 1 MiB or more returns it to the system.

    The setting is process-wide; with another C library than glibc the context does nothing.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def trim() -> None:
    """Returns free memory of every thread's heap to the system; needs some tens of milliseconds."""
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
