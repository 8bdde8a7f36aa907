"""The compiled CPU kernels: matrix products, a whole forward pass, and the reduction of logits."""

import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

from loaders.kernels.build import compiled
from loaders.kernels.decoder import BeyondHalf, Decoder, KVBlocks
from loaders.kernels.decoder_layers import Layer, Norm, Shape
from loaders.kernels.library import Format, Library
from loaders.kernels.matrix import FourBit, PackedMatrix
from loaders.kernels.structures import StructureMismatch
from loaders.kernels.summary import Summary, summarize

__all__ = ["BeyondHalf", "Decoder", "Format", "FourBit", "KVBlocks", "Layer", "Library", "Norm"]
__all__ += [
    "PackedMatrix",
    "Shape",
    "Summary",
    "describe",
    "find",
    "get",
    "load",
    "runnable",
    "summarize",
    "supports",
]

# the CPU flags that each library needs, as in /proc/cpuinfo; best first
_NEEDS = {
    "avx512-bf16": {"avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "fma", "f16c"},
    "avx512": {"avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"},
    "avx2": {"avx2", "bmi2", "fma", "f16c"},
}


@lru_cache(maxsize=1)
def find() -> Library | str:
    """The library for this CPU, after a trial product; or the reason why there is none."""
    if os.environ.get("BITDIAL_KERNELS") == "torch":
        return "switched off by BITDIAL_KERNELS=torch"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return "written for Linux on x86-64"
    if torch.backends.mkldnn.is_available() and "OpenMP" not in torch.__config__.parallel_info():
        return "this build of torch has no OpenMP"
    targets = runnable()
    return load(targets[0]) if targets else "this CPU has no AVX2"


def runnable() -> list[str]:
    """The targets whose instructions this CPU has, best first."""
    flags = _cpu_flags()
    return [name for name, needs in _NEEDS.items() if needs <= flags]


def load(target: str) -> Library | str:
    """The library compiled for ``target``, after a trial product; or the reason why it can't be used."""
    path = compiled(target)
    if not path.exists():
        return "not compiled (python -m loaders.kernels.build does it, given a C compiler)"
    try:
        found = Library(path, target)
        _try_out(found)
    except (OSError, AttributeError, ArithmeticError, RuntimeError, StructureMismatch) as error:
        return f"{path.name} does not work here: {error}"
    return found


def _cpu_flags() -> set[str]:
    """The instruction sets that this CPU has and the operating system enables."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def get() -> Library | None:
    found = find()
    return found if isinstance(found, Library) else None


def describe() -> str:
    """For ``/stats``: which kernels compute, and if not the compiled ones, the reason."""
    found = find()
    return f"compiled ({found.name})" if isinstance(found, Library) else f"torch (compiled ones: {found})"


def _try_out(found: Library) -> None:
    """Compares a small integer product with torch's.

    Raises:
        ArithmeticError: it is wrong, as on a CPU without one of the instructions.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (9, 64), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (5, 64), generator=generator).float()
    x[:, ::4] = 127  # the largest value of each group: its scale is 1
    product = PackedMatrix(found, "int8", weight, scales=torch.ones(9, dtype=torch.float32))(x)
    if not torch.equal(product, x @ weight.float().T):
        raise ArithmeticError("a trial product is wrong")


def supports(kind: Format, inputs: int) -> bool:
    """Whether the compiled kernels support a matrix of this format with that many inputs."""
    found = get()
    return found is not None and found.supports(kind, inputs)
