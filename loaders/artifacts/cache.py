"""What the cache of made files holds, and what leaves it: on request, or where it exceeds its bound."""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loaders.artifacts.in_use import lock_file, unused
from loaders.artifacts.recipe import KEY
from loaders.locking import lock_of, locked_now
from loaders.manifest import Manifest, ManifestError, read_manifest

Kind = Literal["made", "trained", "unfinished", "training", "damaged"]
"""``trained`` files were made by training; ``training`` is the state of an interrupted one."""
_NAME = re.compile(rf"(?P<place>(?P<method>[a-z0-9-]+)-[0-9a-f]{{{KEY}}})(?P<rest>\.partial|\.training)?")
_LOCK = re.compile(rf"(?P<place>[a-z0-9-]+-[0-9a-f]{{{KEY}}})\.(lock|used)")
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
    limit. Locks whose files are gone are removed as well.

    Returns: what was removed.
    """
    found = entries(root)
    excess, removed = sum(one.size for one in found) - limit, []
    for one in found:
        if excess > 0 and one.kind not in _BY_PERSON and remove(one):
            _log.info("removed %s of %s from the cache: it exceeds its limit", one.method, one.model)
            excess -= one.size
            removed.append(one)
    remove_locks(root)
    return removed


def remove(entry: Entry) -> bool:
    """Removes an entry's files; returns False, and removes nothing, if a process makes or uses them."""
    with _idle(_place(entry.path)) as idle:
        if idle and entry.path.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        elif idle:
            entry.path.unlink(missing_ok=True)
    return idle


def remove_locks(root: Path) -> None:
    """Removes locks whose files are gone, but none that a process holds: it may be about to make these."""
    names = [one.name for one in root.iterdir()] if root.is_dir() else []
    matches = [_LOCK.fullmatch(name) for name in names]
    for name in {match["place"] for match in matches if match is not None}:
        with suppress(FileNotFoundError):  # the folder itself is removed
            if not _holds_anything(root / name):
                with _idle(root / name):
                    pass


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
    """Whether no process makes or uses the files; if so, none can begin to within this context.

    Where nothing is left to lock in the end, the locks' files are removed.
    """
    with ExitStack() as stack:
        try:
            idle = stack.enter_context(locked_now(place)) and stack.enter_context(unused(place))
        except OSError:  # the cache can't be written
            idle = False
        yield idle
        if idle and not _holds_anything(place):
            with suppress(OSError):
                lock_file(place).unlink(missing_ok=True)
                lock_of(place).unlink(missing_ok=True)  # last: who has it may remove the other


def _holds_anything(place: Path) -> bool:
    return any(place.with_name(f"{place.name}{rest}").exists() for rest in ("", ".partial", ".training"))
