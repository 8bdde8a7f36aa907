"""Which cached files are in use: a shared lock on a file beside them, which a process keeps until it ends.

The lock is the kernel's (``flock``), so that one of a killed process is gone with it; the time of the lock
file's modification is that of the last use. Where there is no ``flock``, all files count as in use.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from loaders.locking import is_at

_fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None
_held: dict[Path, IO[bytes]] = {}


def lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.used")


def hold(folder: Path) -> None:
    """Keeps other processes from removing a folder until this one ends; notes the time.

    Has no effect where the lock file can't be written.
    """
    path = lock_file(folder)
    with suppress(OSError):
        while _fcntl is not None and (folder not in _held or not is_at(_held[folder], path)):
            file = path.open("ab")
            _fcntl.flock(file, _fcntl.LOCK_SH)  # waits only while another process looks
            _held[folder] = file  # a file that was removed in the meantime is opened again
        os.utime(path)


def release(folder: Path) -> None:
    """The end of what ``hold`` began."""
    if (file := _held.pop(folder, None)) is not None:
        file.close()


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no process holds the folder; if so, none can begin to within this context."""
    path, free = lock_file(folder), False
    if _fcntl is None:
        yield False
        return
    with _opened(path, folder) as file:
        with suppress(OSError):  # another process has it; or the file system has no locks
            _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
            free = is_at(file, path)
        yield free


def _opened(path: Path, folder: Path) -> IO[bytes]:
    """The lock file; a new one gets the folder's time, since looking is no use."""
    new = not path.exists()
    file = path.open("ab")
    if new and folder.exists():
        changed = folder.stat().st_mtime
        os.utime(path, (changed, changed))
    return file
