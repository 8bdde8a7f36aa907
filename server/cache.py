"""Where what was measured or installed for this user is kept between runs."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """A folder of that name in the user's cache; it need not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bitdial" / name
