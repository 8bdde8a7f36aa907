"""The schemes that ``bitdial explain`` shows, by name."""

from loaders.affine.method import Method
from loaders.affine.quantizer import parse as parse_quantizer
from loaders.layers.int4_method import NAME as INT4_TABLE
from loaders.layers.int4_method import Int4Method

COMMON = (
    "int8-tensor",
    "int8-tensor-percentile",
    "int8-tensor-mse",
    "int8-tensor-kl",
    "int8-channel",
    "uint8-channel",
    "int4-channel",
    "int4-channel-mse",
    "int4-32",
    "uint4-32",
    "int8-32",
    "nf4",
    "nf4-nested",
    "fp4",
    INT4_TABLE,
)


def parse(name: str) -> Method:
    """The scheme of a name.

    Raises:
        ValueError: the name has another form.
    """
    if name == INT4_TABLE:
        return Int4Method()
    try:
        return parse_quantizer(name)
    except ValueError as error:
        raise ValueError(f"{error}; or {INT4_TABLE}") from None
