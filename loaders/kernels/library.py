"""A compiled library and the ctypes signatures of its functions."""

import ctypes
from pathlib import Path
from typing import Literal

from loaders.kernels.structures import I64, P, compare_sizes

Format = Literal["float32", "bfloat16", "float16", "four-bit", "int8", "static-int8", "int4"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float16", "four-bit", "int8", "static-int8", "int4")
MOST_STATIC_INPUTS = 2**16  # 255 · 127 · 2¹⁶ < 2³¹: a sum over all inputs is an exact int32
MISCOUNTED = -2  # PHASES_MISCOUNTED of thread_team.h


class Library:
    """One compiled library.

    Args:
        path: the file.
        name: shown to users.

    Raises:
        OSError, AttributeError: it can't be loaded, or lacks a function.
        StructureMismatch: its structures are not those of Python.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        loaded = ctypes.CDLL(str(path))  # releases the GIL for the length of a call
        compare_sizes(loaded)
        self.linear, self.decode = loaded.bitdial_linear, loaded.bitdial_decode
        self.linear.argtypes = [P, P, I64, P, P, ctypes.c_int]
        self.decode.argtypes = [P, P, P, I64, P, ctypes.c_int]
        self.block_tokens = I64.in_dll(loaded, "bitdial_block_tokens").value
        self.summarize = loaded.bitdial_summarize
        self.summarize.argtypes = [P, I64, I64, P, P, P, ctypes.c_int]
        for query in (loaded.bitdial_multiple, loaded.bitdial_computes_in):
            query.argtypes, query.restype = [I64], I64
        loaded.bitdial_static_zero_point.restype = I64
        self.static_zero_point = int(loaded.bitdial_static_zero_point())
        self._multiple, self._computes_in = loaded.bitdial_multiple, loaded.bitdial_computes_in

    def supports(self, kind: Format, inputs: int) -> bool:
        """Whether a matrix of this format can have that many inputs."""
        if kind == "static-int8" and inputs > MOST_STATIC_INPUTS:
            return False
        return inputs > 0 and inputs % int(self._multiple(FORMATS.index(kind))) == 0

    def computes_in(self, kind: Format) -> Format:
        """The type in which weights of ``kind`` are multiplied; sums are float32, or int32 for int8."""
        return FORMATS[int(self._computes_in(FORMATS.index(kind)))]


def check_status(status: int, call: str) -> None:
    """
    Raises:
        MemoryError: the scratch memory of ``call`` could not be allocated.
        RuntimeError: its phases are not as many as its counters are for; its results are invalid.
    """
    if status == MISCOUNTED:
        raise RuntimeError(f"the thread team of {call} ran another number of phases than it has counters for")
    if status < 0:
        raise MemoryError(f"not enough memory for {call}")
