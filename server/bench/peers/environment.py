"""The peers' virtual environment, created once in the user's cache, so that ours stays unchanged."""

import subprocess
import sys
from pathlib import Path

from server.bench.errors import BenchError
from server.host import cache

REQUIREMENTS = ["numpy>=2", "gguf>=0.19", "ctranslate2>=4.8", "llama-cpp-python>=0.3.36"]
"""llama-cpp-python is a source distribution, compiled for this CPU."""
_TRIAL = "import ctranslate2, gguf, llama_cpp, numpy"


def default_folder() -> Path:
    return cache.folder("peers-venv")


def ensure(folder: Path | None = None) -> Path:
    """The environment's interpreter; creates the environment if it is missing or incomplete.

    Args:
        folder: an existing environment of the user; ``default_folder()`` if None.

    Raises:
        BenchError: it can't be created; pip has printed the reason.
    """
    python = (folder or default_folder()) / "bin" / "python"
    if works(python):
        return python
    if folder is not None:
        raise BenchError(f"{folder} is no virtual environment with {', '.join(REQUIREMENTS)}")
    _install(default_folder(), python)
    return python


def works(python: Path) -> bool:
    """Whether this interpreter exists and can import the peers."""
    return python.exists() and not subprocess.run([python, "-c", _TRIAL], capture_output=True).returncode


def _install(folder: Path, python: Path) -> None:
    print(
        f"Installing llama.cpp and CTranslate2 into {folder} (once; llama.cpp is compiled, which takes "
        "some minutes and needs a C++ compiler) …",
        file=sys.stderr,
        flush=True,
    )
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    # verbose, to show the compiler's progress
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "-v", *REQUIREMENTS])
    if not works(python):
        raise BenchError(f"what was installed into {folder} can't be imported")


def _run(command: list[str]) -> None:
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise BenchError(f"{' '.join(command[:4])} … failed")
