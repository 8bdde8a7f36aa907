"""The user's cache folder, for what is measured or installed once and read by later runs."""

import os
from pathlib import Path
from tempfile import TemporaryFile

_ROOM = 4 << 20  # bytes; the figures and plots of any command take less


def folder(name: str) -> Path:
    """The path of a folder in the user's cache; it may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bitdial" / name


def check_room(folder: Path) -> None:
    """Writes a temporary file to the file system of ``folder``, which may not exist yet.

    Called before a measurement that may take hours. Mode bits are no sufficient check: root ignores them, and
    they don't show a file system that is full or read-only.

    Raises:
        OSError: nothing can be written there; ``ENOSPC`` if less than 4 MiB are free.
    """
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    with TemporaryFile(dir=there) as probe:
        probe.write(bytes(_ROOM))
        probe.flush()
