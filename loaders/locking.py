"""Locks between processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from loaders.base import Progress

_POLL = 0.5  # seconds between two tries


@contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
    """Holds the lock ``path``.lock; reports while another process has it.

    Raises:
        OSError: the lock's file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False)
    while True:
        try:
            lock.acquire(timeout=_POLL)
            break
        except Timeout:
            progress("waiting for another process", 0, 0)
    try:
        yield
    finally:
        lock.release()
