"""Everything that a precision's made files depend on, and the key of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loaders.base import Checkpoint, ModelSpec
from loaders.checkpoint import weight_files
from loaders.texts.calibration import calibration_text

_KEY = 16  # hexadecimal digits

Option = str | int | float | bool | None


@dataclass(frozen=True)
class Recipe:
    """How a precision's files are made.

    Args:
        method: the precision's name.
        options: everything else that changes their bytes: group size, observer, samples, seed … and
            ``format``, a number that is raised whenever the same options begin to give other bytes.
        packages: distributions whose versions change the bytes.
        calibrated: whether the calibration text does.
    """

    method: str
    options: Mapping[str, Option]
    packages: tuple[str, ...] = ()
    calibrated: bool = False

    def described(self, spec: ModelSpec) -> dict[str, Any]:
        """The recipe with versions and the digest of the calibration text, as a JSON object.

        Raises:
            CalibrationError: the text can't be read.
        """
        text = calibration_text(spec.calibration) if self.calibrated else None
        return {
            "method": self.method,
            "options": dict(self.options),
            "packages": {name: _version(name) for name in self.packages},
            "calibration": None if text is None else {"name": text.name, "sha256": text.sha256()},
        }


def key_of(recipe: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The key of a described recipe on a described model. A text's or a model's name is no part of it."""
    calibration = recipe["calibration"]
    content = {
        **recipe,
        "calibration": None if calibration is None else calibration["sha256"],
        "model": {**model, "name": None, "revision": None},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_KEY]


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's name and revision, and a digest that identifies its files."""
    return {
        "name": checkpoint.model_id,
        "revision": checkpoint.revision,
        "files": _digest(checkpoint.folder, checkpoint.model_id),
    }


def _digest(folder: Path, name: str) -> str:
    """Of the weight files' sizes, times and headers, and of the texts beside them.

    Weights aren't read: those of large models take longer to hash than to load. A file that was replaced has
    another time of modification.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder, name):
        status = path.stat()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, status.st_size)))
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    for text in ("config.json", "tokenizer.json"):
        if (folder / text).is_file():
            digest.update((folder / text).read_bytes())
    return digest.hexdigest()[:_KEY]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
