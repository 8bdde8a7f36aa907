"""Installs the converter in a virtual environment of its own.

litert-torch needs an older typing-extensions than this package does, so that they can't share one.
"""

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import transformers

from loaders.base import Progress
from loaders.litert.processes import ConverterUnavailable, output_lines

REQUIREMENTS = (
    "torch==2.13.0",  # asked for exactly, pip finds a build for CPUs
    f"transformers=={transformers.__version__}",
    "litert-torch==0.10.0",
    "ai-edge-quantizer==0.10.0",
    "ai-edge-litert==2.3.0",
    "safetensors",
)
COMPLETE = "complete"
"""The file that is written last, with the requirements."""
_ROOM = 2.6e9  # bytes: the environment, and the files of one package while it is unpacked
_TRIAL = "import ai_edge_quantizer, litert_torch, transformers"
_STAGE = "installing LiteRT's converter"
_PACKAGE = re.compile(r"Collecting ([A-Za-z0-9_.-]+)")
_DOWNLOAD = re.compile(r"Downloading (?:.*/)?([A-Za-z0-9_.]+)-\S+ \((.* [kM]B)\)")
_UNPACKING = "Installing collected packages: "


def is_complete(folder: Path) -> bool:
    """Whether an environment was made to its end, of the versions that are needed now."""
    try:
        made = (folder / COMPLETE).read_text()
    except OSError:
        return False
    return made == _written() and python_of(folder).exists()


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def install(folder: Path, progress: Progress) -> None:
    """Makes the environment; nothing of it is left if it fails or is interrupted.

    Raises:
        ConverterUnavailable: it can't be installed; the message has the installer's last error.
    """
    _require_room(folder.parent)
    try:
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], progress)
        python = str(python_of(folder))
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        _report(output_lines([python, "-m", "pip", "install", *options, *REQUIREMENTS]), folder, progress)
        _run([python, "-c", _TRIAL], progress)
        (folder / COMPLETE).write_text(_written())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(command: list[str], progress: Progress) -> None:
    for _ in output_lines(command):
        progress(_STAGE, 0, 0)


def _report(lines: Iterable[str], folder: Path, progress: Progress) -> None:
    """Reports what pip writes: the package that it downloads, then how many it has unpacked."""
    shown, total = _STAGE, 0
    for line in lines:
        if found := _DOWNLOAD.match(line):
            shown = f"{_STAGE}: {found[1]}, {found[2]}"
        elif found := _PACKAGE.match(line):
            shown = f"{_STAGE}: {found[1]}"
        elif line.startswith(_UNPACKING):
            shown, total = f"{_STAGE}: unpacking", line.count(",") + 1
        done = sum(1 for _ in folder.glob("lib/python*/site-packages/*.dist-info")) if total else 0
        progress(shown, min(done, total), total)


def _require_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _ROOM:
        raise ConverterUnavailable(
            f"LiteRT's converter takes {_ROOM / 1e9:.1f} GB in the user's cache, where {free / 1e9:.1f} are "
            "free; XDG_CACHE_HOME names another place"
        )


def _written() -> str:
    return "\n".join(REQUIREMENTS) + "\n"
