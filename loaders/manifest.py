"""``artifact.json``: which files a quantization wrote into a folder, from what, and their digests."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MANIFEST = "artifact.json"
_FORMAT = 1
_MOST = 1 << 20  # bytes of a manifest; real ones have a few hundred


class ManifestError(Exception):
    """A manifest is unreadable, or the files aren't those that it describes; the message says which."""


@dataclass(frozen=True)
class File:
    """One file of an artifact.

    Args:
        size: in bytes.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Args:
        precision: that the files serve.
        recipe: all options that the files depend on, and the versions of packages.
        model: the checkpoint that they were made from: name, revision, digest of its files.
        files: by name.
        made: in ISO 8601.
        seconds: that making them took.
    """

    precision: str
    recipe: Mapping[str, Any]
    model: Mapping[str, Any]
    files: Mapping[str, File]
    made: str
    seconds: float

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def write_manifest(
    folder: Path, precision: str, recipe: Mapping[str, Any], model: Mapping[str, Any], seconds: float
) -> Manifest:
    """Describes all files of ``folder`` in its manifest, which is the last file to be written."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    made = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(precision, recipe, model, files, made, round(seconds, 1))
    (folder / MANIFEST).write_text(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ManifestError: there is none, or it can't be read.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MOST or not path.is_file():
            raise ValueError("not a small regular file")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != _FORMAT:
            raise ValueError("another format")
        files = {_plain(name): File(**file) for name, file in raw.pop("files").items()}
        found = Manifest(**raw, files=files)
        if not isinstance(found.precision, str) or not all(_is_valid(file) for file in files.values()):
            raise ValueError("values of other types")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} is missing or can't be read") from error


def verify(folder: Path, manifest: Manifest, only: Sequence[str] = ()) -> None:
    """Compares files with their digests.

    Args:
        only: names of files; all if empty.

    Raises:
        ManifestError: a file is missing, or was changed since it was written.
    """
    for name, expected in manifest.files.items():
        if only and name not in only:
            continue
        try:
            found = _describe(folder / name)
        except OSError as error:
            raise ManifestError(f"{name} can't be read ({type(error).__name__})") from error
        if found != expected:
            raise ManifestError(f"{name} is damaged: it is not what was written")


def _describe(path: Path) -> File:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(path.stat().st_size, digest)


def _plain(name: str) -> str:
    if Path(name).name != name:
        raise ValueError("a file outside of the folder")
    return name


def _is_valid(file: File) -> bool:
    return type(file.size) is int and file.size >= 0 and isinstance(file.sha256, str)
