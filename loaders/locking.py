"""Locks between processes: the kernel's (``flock``), so that one of a killed process is gone with it.

A lock's file may be removed by the process that holds the lock. Another process may have opened it just
before, and would then lock a file that no later one opens; so each compares, once it has the lock, the file
that it locked with the one at the path, and begins again if they differ.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from loaders.base import Progress

_POLL = 0.5  # seconds between two tries
_fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None
_Release = Callable[[], None]


@contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
    """Holds the lock ``path``.lock; reports while another process has it.

    Raises:
        OSError: the lock's file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while (release := _take(lock_of(path))) is None:
        progress("waiting for another process", 0, 0)
        time.sleep(_POLL)
    try:
        yield
    finally:
        release()


@contextmanager
def locked_now(path: Path) -> Iterator[bool]:
    """Whether the lock ``path``.lock was free; if so, this process holds it within this context.

    Raises:
        OSError: the lock's file can't be written.
    """
    release = _take(lock_of(path))
    try:
        yield release is not None
    finally:
        if release is not None:
            release()


def lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one of that path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(path: Path) -> _Release | None:
    """Locks a file, which is made if it is missing; None if another process, or thread, has the lock.

    Raises:
        OSError
    """
    while _fcntl is not None:
        file, new = _opened(path)
        try:
            _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EACCES: of some network file systems
            file.close()
            return None
        except OSError as error:
            file.close()
            if error.errno != errno.ENOSYS:
                raise
            if new:  # there, a file that exists is a lock
                path.unlink(missing_ok=True)
            break
        if is_at(file, path):
            return partial(_release, file)
        file.close()
    return _take_without_flock(path)


def _release(file: IO[bytes]) -> None:
    with file:
        _fcntl.flock(file, _fcntl.LOCK_UN)  # closing isn't enough if a child has inherited the file


def _opened(path: Path) -> tuple[IO[bytes], bool]:
    """The file, and whether it is new."""
    with suppress(FileExistsError):
        return path.open("xb"), True
    return path.open("ab"), False


def _take_without_flock(path: Path) -> _Release | None:
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock.release
