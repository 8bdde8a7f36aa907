"""The structures that C and Python share; their sizes are compared when a library is loaded."""

import ctypes

P, I64 = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """``matrix`` of matrix.h."""

    _fields_ = [
        *((name, I64) for name in ("format", "outputs", "inputs")),
        *((name, P) for name in ("data", "scales", "bias")),
        ("bias_format", I64),
        ("table", P),
        ("block", I64),
        *((name, P) for name in ("codes", "nested_table", "nested_scales")),
        ("nested_offset", ctypes.c_float),
        ("lane_scales", P),
    ]


class Norm(ctypes.Structure):
    """``norm`` of rowwise.h."""

    _fields_ = [("weight", Matrix), ("bias", Matrix)]


class Layer(ctypes.Structure):
    """``layer`` of gpt2.c, as the following ones."""

    _fields_ = [
        ("before_attention", Norm),
        ("before_mlp", Norm),
        *((name, P) for name in ("qkv", "attention_out", "up", "down")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("width", "heads", "layer_count")),
        *((name, P) for name in ("tokens", "positions", "layers")),
        ("last", Norm),
        ("head", P),
        ("epsilon", ctypes.c_float),
    ]


class TokenRows(ctypes.Structure):
    _fields_ = [*((name, P) for name in ("ids", "slots", "positions")), ("count", I64)]


class Cache(ctypes.Structure):
    _fields_ = [("keys", P), ("values", P), ("context", I64), ("kind", I64)]


SHARED: dict[str, type[ctypes.Structure]] = {
    "matrix": Matrix,
    "norm": Norm,
    "layer": Layer,
    "gpt2": Model,
    "token_rows": TokenRows,
    "cache": Cache,
}
"""By their names in C."""


class StructureMismatch(Exception):
    """C and Python disagree on a structure: a call would read other memory than it was given."""


def compare_sizes(library: ctypes.CDLL) -> None:
    """
    Raises:
        StructureMismatch: names the first structure whose sizes differ.
    """
    for name, structure in SHARED.items():
        try:
            expected = I64.in_dll(library, f"bitdial_sizeof_{name}").value
        except ValueError as error:  # the library lacks the symbol
            raise StructureMismatch(f"structure {name!r} is unknown in C") from error
        found = ctypes.sizeof(structure)
        if expected != found:
            raise StructureMismatch(f"structure {name!r} has {expected} bytes in C, {found} in Python")
