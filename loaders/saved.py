"""Checkpoints that are quantized already: in which precision, and by which of their files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders import PRECISIONS
from loaders.config_check import Held
from loaders.errors import CheckpointError
from loaders.manifest import ManifestError, read_manifest

OWN = "bitdial"
"""``quant_method`` of a checkpoint that ``bitdial quantize`` saved in a form of its own."""
_BYTES_A_LAYER = 64  # fewer than any real layer's


def saved_precision(raw: Mapping[str, Any], name: str) -> str | None:
    """The precision that a checkpoint's ``quantization_config`` names; None without one.

    Raises:
        CheckpointError: it is quantized in a way that no precision serves.
    """
    method = raw.get("quantization_config")
    if not method:
        return None
    kind = method.get("quant_method") if isinstance(method, dict) else None
    precision = None
    if kind == OWN:
        precision = method.get("precision")
    elif kind == "bitsandbytes":
        precision = "int8" if method.get("load_in_8bit") is True else method.get("bnb_4bit_quant_type")
    if not isinstance(precision, str) or precision not in PRECISIONS:
        shown = f"{str(kind)[:40]}{'' if precision is None else f', {str(precision)[:40]}'}"
        raise CheckpointError(
            f"{name} is quantized already ({shown}), in a form that no precision serves; "
            "name the model it was made from"
        )
    return precision


def has_own_form(raw: Mapping[str, Any]) -> bool:
    """Whether the weights are in files of this product, which its manifest describes."""
    method = raw.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == OWN


def own_files(folder: Path, name: str) -> list[Path]:
    """The files that the manifest of a saved checkpoint names; their sizes are compared, not their content.

    Raises:
        CheckpointError: the manifest is missing, or a file is missing or truncated.
    """
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        raise CheckpointError(f"{name} is incomplete: {error}") from error
    for file, expected in manifest.files.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != expected.size:
            raise CheckpointError(f"{name} is incomplete: {file} is missing or truncated; quantize it again")
    return [folder / file for file in manifest.files]


def held_by(files: list[Path]) -> Held:
    """Upper bounds of what the files hold, whatever their format: two weights in a byte."""
    size = sum(file.stat().st_size for file in files)
    return Held(size // _BYTES_A_LAYER, 2 * size)
