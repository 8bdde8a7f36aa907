"""The converter's virtual environment, made once in the user's cache, and its programs.

Serving a converted model needs ``ai-edge-litert`` alone, which installs beside this package.
"""

import json
import os
from pathlib import Path
from typing import Any

import loaders
from loaders.base import Progress
from loaders.errors import CheckpointError
from loaders.litert.installation import REQUIREMENTS, install, is_complete, python_of
from loaders.litert.messages import ERROR, PROGRESS
from loaders.litert.processes import ConverterUnavailable, output_lines
from loaders.locking import locked

VERSIONS = " ".join(REQUIREMENTS)
"""What the converter's files depend on."""
FOLDER = "BITDIAL_LITERT_CONVERTER"
"""The environment variable that names an existing environment; it is used as it is, never installed."""


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(cache) / "bitdial" / "litert-venv")


def interpreter() -> Path | None:
    """The environment's interpreter; None if it has to be installed, or the user's own is missing."""
    folder = default_folder()
    usable = python_of(folder).exists() if os.environ.get(FOLDER) else is_complete(folder)
    return python_of(folder) if usable else None


def missing() -> str | None:
    """Why nothing can be converted: the environment that the user names doesn't exist."""
    if os.environ.get(FOLDER) and interpreter() is None:
        return f"{FOLDER} names no environment with LiteRT's converter"
    return None


def ensure(progress: Progress) -> Path:
    """The environment's interpreter; installs the converter if it is missing or of other versions.

    While another process installs it, this one waits.

    Raises:
        ConverterUnavailable: it can't be installed.
    """
    if why := missing():
        raise ConverterUnavailable(why)
    if (python := interpreter()) is not None:
        return python
    folder = default_folder()
    try:
        with locked(folder, progress):
            if not is_complete(folder):
                install(folder, progress)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConverterUnavailable(
            f"LiteRT's converter can't be installed in the user's cache ({why}); "
            "XDG_CACHE_HOME names another place"
        ) from error
    return python_of(folder)


def run(module: str, job: dict[str, Any], folder: Path, progress: Progress) -> None:
    """Runs a module of this package on a job in the converter's environment.

    Args:
        folder: for the job's file.

    Raises:
        CheckpointError: the model can't be converted.
        ConverterUnavailable: the converter can't be installed or was killed.
    """
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    root = Path(loaders.__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    python, stage = ensure(progress), ("starting LiteRT's converter", 0, 0)
    for line in output_lines([str(python), "-m", module, str(file)], environment):
        if line.startswith(PROGRESS):
            stage = json.loads(line.removeprefix(PROGRESS))
        elif line.startswith(ERROR):
            raise CheckpointError(json.loads(line.removeprefix(ERROR)))
        progress(*stage)
    file.unlink()
