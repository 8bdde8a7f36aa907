"""Installs an emulated card in this process, once, before anything queries torch.cuda."""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("native.cpp")


def begin() -> None:
    """Raises: OSError, CalledProcessError: there is no C++ compiler; RuntimeError: torch has CUDA itself."""
    if torch.version.cuda is not None:
        raise RuntimeError("this torch has CUDA, so that no card can be emulated")
    import bitsandbytes  # noqa: F401 (before the card exists: it would load its CUDA library)

    from tests.emulated_card import cuda, dispatch, memory, naming

    memory.begin(_native())
    dispatch.begin()
    cuda.begin()
    naming.begin()


def _native() -> ctypes.CDLL:
    """Compiled against this torch; it stays loaded after its file is deleted."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "native.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(_SOURCE)]
        command += ["-o", str(library), f"-L{root}/lib", "-lc10"]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(library))
