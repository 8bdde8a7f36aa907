"""The converter's virtual environment, made once in the user's cache.

litert-torch needs an older typing-extensions than this package does, so that they can't share one. Serving a
converted model needs ``ai-edge-litert`` alone, which installs beside this package.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock

import loaders
from loaders.base import Progress
from loaders.errors import CheckpointError, LoaderError
from loaders.litert.messages import ERROR, PROGRESS

REQUIREMENTS = (
    "torch==2.13.0",  # asked for exactly, pip finds a build for CPUs
    f"transformers=={transformers.__version__}",
    "litert-torch==0.10.0",
    "ai-edge-quantizer==0.10.0",
    "ai-edge-litert==2.3.0",
    "safetensors",
)
FOLDER = "BITDIAL_LITERT_CONVERTER"
"""The environment variable that names an existing environment; it is used as it is, never installed."""
_TRIAL = "import ai_edge_quantizer, litert_torch, transformers"
_STAGE = "installing LiteRT's converter"
_TAIL = 12  # lines of a failed process's output that are searched for the reason


class ConverterUnavailable(LoaderError):
    """The converter can't be installed or run."""


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(cache) / "bitdial" / "litert-venv")


def interpreter() -> Path | None:
    """The environment's interpreter if it was made completely; None without it."""
    python = default_folder() / "bin" / "python"
    return python if (default_folder() / "complete").exists() and python.exists() else None


def missing() -> str | None:
    """Why nothing can be converted: the environment that the user names doesn't exist."""
    if os.environ.get(FOLDER) and interpreter() is None:
        return f"{FOLDER} names no environment with LiteRT's converter"
    return None


def ensure(progress: Progress) -> Path:
    """The environment's interpreter; installs the converter if it is missing (2 GB, a few minutes).

    Raises:
        ConverterUnavailable: it can't be installed; the message has the installer's last line.
    """
    if why := missing():
        raise ConverterUnavailable(why)
    folder = default_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if (python := interpreter()) is None:
            python = _install(folder, progress)
    return python


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
    lines: deque[str] = deque(maxlen=_TAIL)
    python = ensure(progress)
    for line in _lines([str(python), "-m", module, str(file)], lines, environment):
        if line.startswith(PROGRESS):
            progress(*json.loads(line.removeprefix(PROGRESS)))
        elif line.startswith(ERROR):
            raise CheckpointError(json.loads(line.removeprefix(ERROR)))
    file.unlink()


def _install(folder: Path, progress: Progress) -> Path:
    python = folder / "bin" / "python"
    progress(_STAGE, 0, 0)
    _check_call([sys.executable, "-m", "venv", "--clear", str(folder)])
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    lines: deque[str] = deque(maxlen=_TAIL)
    for done, _ in enumerate(
        line for line in _lines([*command, *REQUIREMENTS], lines) if "Collecting" in line
    ):
        progress(_STAGE, done, 0)
    _check_call([str(python), "-c", _TRIAL])
    (folder / "complete").touch()
    return python


def _check_call(command: Sequence[str]) -> None:
    for _ in _lines(command, deque(maxlen=_TAIL)):
        pass


def _lines(
    command: Sequence[str], last: deque[str], environment: dict[str, str] | None = None
) -> Iterator[str]:
    """The lines that a command writes.

    Raises:
        ConverterUnavailable: it failed.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last.append(line.strip())
                yield line
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ConverterUnavailable(_reason(last, process.returncode))


def _reason(last: Sequence[str], code: int) -> str:
    errors = [line for line in last if line.lower().startswith("error")] or [line for line in last if line]
    network = any("connection" in line.lower() or "resolve" in line.lower() for line in last)
    hint = "; it is installed once, which needs a network" if network or "No matching" in str(errors) else ""
    why = f"exit code {code}" if code < 0 or not errors else errors[-1][:200]
    return f"LiteRT's converter can't be used ({why}){hint}"
