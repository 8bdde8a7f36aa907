"""The compiled CPU kernels, called on tensors: matrix products and attention of a decode step."""

import ctypes
import os
import platform
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loaders.kernels.build import library

Format = Literal["float32", "bfloat16", "float16", "four-bit", "int8"]
_FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float16", "four-bit", "int8")
# what each library's instructions are called by the operating system, best first
_NEEDS = {
    "avx512-bf16": {"avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "fma", "f16c"},
    "avx512": {"avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"},
    "avx2": {"avx2", "bmi2", "fma", "f16c"},
}
_P, _I64 = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    """``matrix`` of matrix.h."""

    _fields_ = [
        *((name, _I64) for name in ("format", "outputs", "inputs")),
        *((name, _P) for name in ("data", "scales", "bias", "table")),
        ("block", _I64),
        *((name, _P) for name in ("codes", "nested_table", "nested_scales")),
        ("nested_offset", ctypes.c_float),
    ]


class Library:
    """One compiled library.

    Args:
        path: the file.
        name: what to call it to a user.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        loaded = ctypes.CDLL(str(path))  # releases the GIL for the length of a call
        self.linear, self.attention = loaded.bitdial_linear, loaded.bitdial_attention
        self.linear.argtypes = [_P, _P, _I64, _P, _P, ctypes.c_int]
        self.attention.argtypes = [_P] * 5 + [_I64] * 4 + [_P, ctypes.c_int]
        for query in (loaded.bitdial_multiple, loaded.bitdial_computes_in):
            query.argtypes, query.restype = [_I64], _I64
        self._multiple, self._computes_in = loaded.bitdial_multiple, loaded.bitdial_computes_in

    def supports(self, kind: Format, inputs: int) -> bool:
        """Whether rows of that many inputs can be multiplied in this format."""
        return inputs > 0 and inputs % int(self._multiple(_FORMATS.index(kind))) == 0

    def computes_in(self, kind: Format) -> Format:
        """The type that weights kept in ``kind`` are multiplied in; sums are float32, of int8 int32."""
        return _FORMATS[self._computes_in(_FORMATS.index(kind))]


@lru_cache(maxsize=1)
def find() -> Library | str:
    """The library for this CPU, tried out; or the reason why there is none."""
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
    """The library compiled for ``target``, tried out; or the reason why it can't be had."""
    path = library(target)
    if not path.exists():
        return "not compiled (python -m loaders.kernels.build does it, given a C compiler)"
    try:
        found = Library(path, target)
        _try_out(found)
    except (OSError, AttributeError, ArithmeticError) as error:
        return f"{path.name} does not work here: {error}"
    return found


def _cpu_flags() -> set[str]:
    """The instruction sets that this CPU has and the kernel lets programs use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def get() -> Library | None:
    found = find()
    return found if isinstance(found, Library) else None


def describe() -> str:
    """For ``/stats``: which kernels compute, and why not the compiled ones."""
    found = find()
    return f"compiled ({found.name})" if isinstance(found, Library) else f"torch (compiled ones: {found})"


def _try_out(found: Library) -> None:
    """A small integer product against torch's: a CPU that lacks an instruction must not answer wrongly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (9, 64), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (5, 64), generator=generator).float()
    x[:, 0] = 127  # so that each row's scale is 1
    product = PackedMatrix("int8", weight, scales=torch.ones(9), library=found)(x)
    if not torch.equal(product, x @ weight.float().T):
        raise ArithmeticError("a trial product is wrong")


def supports(kind: Format, inputs: int) -> bool:
    """Whether the compiled kernels multiply rows of that many inputs in this format."""
    found = get()
    return found is not None and found.supports(kind, inputs)


@dataclass
class FourBit:
    """How the codes of a four-bit matrix become weights.

    Args:
        table: (16,) float32, what each code stands for.
        block: weights that share a scale.
        scales: (weights / block,) float32; or, nested, uint8 codes into ``nested_table``.
        nested_table: (256,) float32.
        nested_scales: one float32 per 256 scales.
        nested_offset: added to each nested scale.
    """

    table: Tensor
    block: int
    scales: Tensor
    nested_table: Tensor | None = None
    nested_scales: Tensor | None = None
    nested_offset: float = 0.0


@dataclass
class PackedMatrix:
    """A weight matrix as the kernels read it: the given tensors, none copied.

    Args:
        kind: how ``data`` is to be read.
        data: (outputs, inputs), contiguous; four-bit: (outputs, inputs / 2) bytes, the first of two weights
            in the upper half.
        scales: int8: (outputs,) float32.
        bias: (outputs,) float32 or None.
    """

    kind: Format
    data: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    four_bit: FourBit | None = None
    library: Library | None = field(default_factory=get)

    def __post_init__(self) -> None:
        assert self.library is not None, "no compiled kernels"
        tensors = (self.data, self.scales, self.bias)
        assert all(t is None or (t.is_contiguous() and t.device.type == "cpu") for t in tensors)
        self.outputs = self.data.shape[0]
        self.inputs = self.data.shape[1] * (2 if self.kind == "four-bit" else 1)
        self._call = self.library.linear
        self._struct = _Matrix(_FORMATS.index(self.kind), self.outputs, self.inputs, self.data.data_ptr())
        self._struct.bias = _address(self.bias)
        self._struct.scales = _address(self.scales)
        if self.four_bit is not None:
            self._set_four_bit(self.four_bit)
        self._address = ctypes.addressof(self._struct)

    def _set_four_bit(self, state: FourBit) -> None:
        self._struct.table, self._struct.block = state.table.data_ptr(), state.block
        if state.nested_table is None:
            self._struct.scales = state.scales.data_ptr()
        else:
            self._struct.codes = state.scales.data_ptr()
            self._struct.nested_table = state.nested_table.data_ptr()
            self._struct.nested_scales = _address(state.nested_scales)
            self._struct.nested_offset = state.nested_offset

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(rows, outputs) = x Wᵀ + bias (+ residual) of (rows, inputs) float32; each row by itself."""
        rows = x.shape[0]
        y = torch.empty(rows, self.outputs)
        if not rows:
            return y
        given = None if residual is None else residual.data_ptr()
        threads = torch.get_num_threads()
        if self._call(self._address, x.data_ptr(), rows, given, y.data_ptr(), threads):
            raise MemoryError("not enough memory for a matrix product")
        return y


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, found: Library
) -> Tensor:
    """Appends each row's key and value to its slot; attends to the slot up to the row's own position.

    Args:
        qkv: (rows, 3 · heads · dim) float32.
        keys, values: (slots, heads, context, dim) float32, written in place.
        slots, positions: (rows,) int64, where each row stands.

    Returns: (rows, heads · dim).
    """
    _, heads, context, dim = keys.shape
    rows = qkv.shape[0]
    out = torch.empty(rows, heads * dim)
    failed = found.attention(
        *(tensor.data_ptr() for tensor in (qkv, keys, values, slots, positions)),
        *(rows, heads, dim, context, out.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("not enough memory for attention")
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
