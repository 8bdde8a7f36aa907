"""A compiled library: what it can do, and its functions as ctypes sees them."""

import ctypes
from pathlib import Path
from typing import Literal

Format = Literal["float32", "bfloat16", "float16", "four-bit", "int8"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float16", "four-bit", "int8")
P, I64 = ctypes.c_void_p, ctypes.c_int64


class Library:
    """One compiled library.

    Args:
        path: the file.
        name: what to call it to a user.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        loaded = ctypes.CDLL(str(path))  # releases the GIL for the length of a call
        self.linear, self.gpt2 = loaded.bitdial_linear, loaded.bitdial_gpt2
        self.linear.argtypes = [P, P, I64, P, P, ctypes.c_int]
        self.gpt2.argtypes = [P, P, P, I64, P, ctypes.c_int]
        self.summarize = loaded.bitdial_summarize
        self.summarize.argtypes = [P, I64, I64, P, P, P, ctypes.c_int]
        for query in (loaded.bitdial_multiple, loaded.bitdial_computes_in):
            query.argtypes, query.restype = [I64], I64
        self._multiple, self._computes_in = loaded.bitdial_multiple, loaded.bitdial_computes_in

    def supports(self, kind: Format, inputs: int) -> bool:
        """Whether rows of that many inputs can be multiplied in this format."""
        return inputs > 0 and inputs % int(self._multiple(FORMATS.index(kind))) == 0

    def computes_in(self, kind: Format) -> Format:
        """The type that weights kept in ``kind`` are multiplied in; sums are float32, of int8 int32."""
        return FORMATS[int(self._computes_in(FORMATS.index(kind)))]
