"""A checkpoint written by ``export``, read without torch. Runs in the peers' environment."""

import json
from pathlib import Path
from typing import Any

import numpy as np

_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


class Exported:
    """A checkpoint written by ``export``.

    Args:
        folder: where it was written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "model.json").read_text())

    def weight(self, name: str) -> np.ndarray:
        """A parameter by ``transformers``' name; matrices as (outputs, inputs): Conv1D's are transposed."""
        array: np.ndarray = np.load(self._folder / f"{name}.npy", mmap_mode="r")
        return np.ascontiguousarray(array.T) if name.endswith(_CONV1D) else array

    def names(self) -> list[str]:
        return sorted(file.stem for file in self._folder.glob("*.npy"))

    def has(self, name: str) -> bool:
        return (self._folder / f"{name}.npy").exists()
