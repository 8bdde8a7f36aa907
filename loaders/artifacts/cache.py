"""What the cache of made files holds, and what leaves it: on request, or where it exceeds its bound."""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from loaders.artifacts.in_use import lock_file, unused
from loaders.artifacts.recipe import KEY
from loaders.manifest import Manifest, ManifestError, read_manifest

Kind = Literal["made", "trained", "unfinished", "training", "damaged"]
"""``trained`` files were made by training; ``training`` is the state of an interrupted one."""
_NAME = re.compile(rf"(?P<place>(?P<method>[a-z0-9-]+)-[0-9a-f]{{{KEY}}})(?P<rest>\.partial|\.training)?")
_BY_PERSON: tuple[Kind, ...] = ("trained", "training")  # hours of work, which no load begins by itself
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One method's files of one model.

    Args:
        path: a folder, or the file of a training's state.
        model: the checkpoint's name; None if it is unknown.
        size: bytes.
        used: when a process last began to use them, in seconds since the epoch.
        in_use: whether a process does.
    """

    path: Path
    kind: Kind
    method: str
    model: str | None
    size: int
    used: float
    in_use: bool

    @property
    def name(self) -> str:
        return self.path.name


def entries(root: Path) -> list[Entry]:
    """What is in the cache, the least recently used first; a folder that doesn't exist holds nothing."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        with suppress(FileNotFoundError):  # another process removes it
            if (match := _NAME.fullmatch(path.name)) is not None:
                found.append(_entry(path, match))
    return sorted(found, key=lambda one: one.used)


def evict(root: Path, limit: int) -> list[Entry]:
    """Removes the least recently used files until those left take at most ``limit`` bytes.

    Files in use stay, and so do those of a training, which no load makes again: the rest may exceed the
    limit.

    Returns: what was removed.
    """
    found = entries(root)
    excess, removed = sum(one.size for one in found) - limit, []
    for one in found:
        if excess > 0 and one.kind not in _BY_PERSON and remove(one):
            _log.info("removed %s of %s from the cache: it exceeds its limit", one.method, one.model)
            excess -= one.size
            removed.append(one)
    return removed


def remove(entry: Entry) -> bool:
    """Removes an entry's files; returns False, and removes nothing, if a process makes or uses them."""
    place = _place(entry.path)
    with _idle(place) as idle:
        if idle and entry.path.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        elif idle:
            entry.path.unlink(missing_ok=True)
        if idle and not place.exists():
            lock_file(place).unlink(missing_ok=True)
    return idle


def _entry(path: Path, match: re.Match[str]) -> Entry:
    place = _place(path)
    rest = match["rest"]
    kind, manifest = _kind(path, rest)
    files = [one.stat() for one in ([path] if path.is_file() else path.iterdir())]
    mark = lock_file(place) if rest is None and lock_file(place).exists() else path
    used = mark.stat().st_mtime
    model = None if manifest is None else str(manifest.model.get("name"))
    with _idle(place) as idle:
        in_use = not idle
    return Entry(path, kind, match["method"], model, sum(one.st_size for one in files), used, in_use)


def _kind(path: Path, rest: str | None) -> tuple[Kind, Manifest | None]:
    if rest is not None:
        return ("unfinished" if rest == ".partial" else "training"), None
    try:
        manifest = read_manifest(path)
    except ManifestError:
        return "damaged", None
    trained = "steps" in manifest.recipe.get("options", {})
    return ("trained" if trained else "made"), manifest


def _place(path: Path) -> Path:
    """The folder of finished files, by which locks are named."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return path.with_name(match["place"])


@contextmanager
def _idle(place: Path) -> Iterator[bool]:
    """Whether no process makes or uses the files; if so, none can begin to within this context."""
    lock = FileLock(place.with_name(f"{place.name}.lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # another process has it; or the cache can't be written
        yield False
        return
    try:
        with unused(place) as free:
            yield free
    finally:
        lock.release()
