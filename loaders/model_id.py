"""What names a model: the bundled one, a local folder, or a hub id, which may have a revision after ``@``."""

import contextlib
import re
from pathlib import Path

BUNDLED = "bundled"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def is_hub_id(text: str) -> bool:
    """Whether it has the form of a hub id, with or without an owner."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def local_folder(model_id: str) -> Path | None:
    """The folder of that path; None if there is none."""
    # no path at all: too long, a NUL byte, an unknown home
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        if model_id and (folder := Path(model_id).expanduser().resolve()).is_dir():
            return folder
    return None


def own_name(model_id: str) -> str:
    """The name of a model that is given no other: its id, or the folder's name."""
    folder = None if model_id == BUNDLED else local_folder(model_id)
    return model_id if folder is None else folder.name


def split_revision(text: str) -> tuple[str, str | None]:
    """``"owner/name@revision"`` → both, as in the addresses of ``huggingface_hub``; others as they are.

    An existing folder is a folder, whatever its name.
    """
    base, at, revision = text.partition("@")
    if not at or not is_hub_id(base) or local_folder(text) is not None:
        return text, None
    return base, revision
