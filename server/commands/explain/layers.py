"""The weight matrices of a checkpoint, by name, and which of them lose most."""

import difflib
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from loaders.affine.applied import Matrix
from loaders.affine.method import Method
from loaders.base import ModelSpec, Progress
from loaders.errors import CheckpointError
from loaders.layer_errors import Originals
from loaders.layers.layer_weights import weights_of
from loaders.pretrained import meta_model


class NoSuchLayer(Exception):
    """The model has no layer of that name; the message lists similar ones."""


@dataclass(frozen=True)
class Ranked:
    """A linear layer and its error in one scheme.

    Args:
        outlier: the largest magnitude in standard deviations.
    """

    name: str
    shape: tuple[int, int]
    outlier: float
    relative_error: float
    sqnr_db: float | None


class Layers:
    """The checkpoint's weight matrices, read one at a time; a context manager."""

    def __init__(self, spec: ModelSpec) -> None:
        self._model = meta_model(spec)
        self._originals = Originals(spec.checkpoint, self._model)
        self._modules: dict[str, nn.Module] = {
            name: one for name, one in self._model.named_modules() if weights_of(one) is not None
        }

    def __enter__(self) -> Self:
        self._originals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._originals.__exit__()

    def kind(self, name: str) -> str:
        """The class of the layer."""
        return type(self._modules[name]).__name__

    def find(self, name: str) -> str:
        """The layer of that name, or the only one whose name ends so.

        Raises:
            NoSuchLayer
        """
        if name in self._modules:
            return name
        ends = [one for one in self._modules if one.endswith(f".{name}")]
        if len(ends) == 1:
            return ends[0]
        similar = ends or difflib.get_close_matches(name, self._modules, 4, 0.4) or list(self._modules)
        reason = "several layers end in" if ends else "no layer"
        more = f" … ({len(similar)} in all)" if len(similar) > 4 else ""
        raise NoSuchLayer(f"--layer: {reason} {name!r}; for example {', '.join(similar[:4])}{more}")

    def weight(self, name: str) -> Tensor:
        """The (outputs, inputs) float32 matrix.

        Raises:
            CheckpointError: the files have no tensor of that name, or it has NaN or infinite values.
        """
        weight = self._originals.weight(name)
        if weight is None:
            raise CheckpointError(f"the checkpoint has no tensor of {name}")
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{name} has weights that are NaN or infinite")
        return weight.contiguous()

    def ranking(self, quantizer: Method, progress: Progress) -> list[Ranked]:
        """The linear layers, the one with the largest relative error first.

        Raises:
            CheckpointError: the model has no linear layer that can be quantized so.
        """
        linear = [name for name, one in self._modules.items() if not isinstance(one, nn.Embedding)]
        found = []
        for done, name in enumerate(linear, 1):
            weight = self.weight(name)
            try:
                sums = Matrix(weight, 1).error(quantizer)
            except ValueError as error:
                reason = str(error)
            else:
                outputs, inputs = weight.shape
                outlier = float(weight.abs().max() / weight.std().clamp_min(1e-38))
                found.append(Ranked(name, (outputs, inputs), outlier, sums.relative, sums.sqnr_db))
            progress("quantizing", done, len(linear))
        if not found:
            raise CheckpointError(
                f"{quantizer.name}: {reason}" if linear else "the model has no linear layer"
            )
        return sorted(found, key=lambda one: -one.relative_error)
