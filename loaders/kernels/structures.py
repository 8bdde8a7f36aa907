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
        *((name, P) for name in ("lane_scales", "input_factors", "offsets", "values", "group_scales")),
    ]


class Norm(ctypes.Structure):
    """``norm`` of rowwise.h."""

    _fields_ = [("weight", Matrix), ("bias", Matrix)]


class Layer(ctypes.Structure):
    """``layer`` of decoder.h, as the following ones."""

    _fields_ = [
        *((name, Norm) for name in ("before_attention", "before_mlp", "query", "key")),
        ("qkv", P * 3),
        ("attention_out", P),
        ("mlp_in", P * 2),
        ("down", P),
        ("window", I64),
    ]


class Decoder(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("width", "heads", "kv_heads", "head_dim", "inner", "layer_count")),
        *((name, I64) for name in ("norm_kind", "activation", "gated", "interleaved", "parallel", "rotary")),
        *((name, P) for name in ("tokens", "token_scales", "positions", "turns", "layers")),
        ("last", Norm),
        ("head", P),
        *((name, ctypes.c_float) for name in ("epsilon", "attention_scale")),
    ]


class TokenRows(ctypes.Structure):
    _fields_ = [*((name, P) for name in ("ids", "slots", "positions")), ("count", I64)]


class Cache(ctypes.Structure):
    _fields_ = [
        ("pool", P),
        ("tables", P),
        *((name, I64) for name in ("table_length", "block_bytes", "kind")),
    ]


SHARED: dict[str, type[ctypes.Structure]] = {
    "matrix": Matrix,
    "norm": Norm,
    "layer": Layer,
    "decoder": Decoder,
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
