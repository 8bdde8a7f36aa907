"""Where what was measured or installed for this user is kept between runs."""

import os
from pathlib import Path
from tempfile import TemporaryFile

_ROOM = 4 << 20  # bytes: more than the figures and plots of any command


def folder(name: str) -> Path:
    """A folder of that name in the user's cache; it need not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bitdial" / name


def check_room(folder: Path) -> None:
    """Writes to the file system of ``folder``, which need not exist yet, and leaves nothing behind.

    To be called before a measurement that may take hours. Mode bits alone don't show it: root passes them,
    and so does a file system that is full or read-only.

    Raises:
        OSError: nothing can be written there; ``ENOSPC`` where there is less room than 4 MiB.
    """
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    with TemporaryFile(dir=there) as probe:
        probe.write(bytes(_ROOM))
        probe.flush()
