"""What a recipe and a model are, in full, and the key of both."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loaders.base import Checkpoint, ModelSpec, Recipe
from loaders.checkpoint import weight_files
from loaders.texts.calibration import calibration_text

KEY = 16  # hexadecimal digits


def describe(recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """The recipe with versions and the digest of the calibration text, as a JSON object.

    Raises:
        CalibrationError: the text can't be read.
    """
    text = calibration_text(spec.calibration) if recipe.calibrated else None
    return {
        "method": recipe.method,
        "options": dict(recipe.options),
        "packages": {name: _version(name) for name in recipe.packages},
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
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY]


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
    return digest.hexdigest()[:KEY]


@cache  # a package's metadata takes milliseconds to parse
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
