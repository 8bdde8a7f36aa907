"""Per-layer error report: each matrix of a loaded model compared with the checkpoint's.

Where a norm was folded into a layer (``fold_norms``), the checkpoint's matrix is multiplied by its factors.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor, nn

from loaders.affine.error import compare
from loaders.base import Checkpoint, LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.checkpoint import weight_files
from loaders.footprint import quantization_warning
from loaders.layers.layer_weights import DescribedLayers, InputCalibration, LayerWeights, weights_of
from loaders.pretrained import meta_model
from loaders.runner import Runner


@dataclass(frozen=True)
class LayerError:
    """One matrix of a loaded model compared with the checkpoint's.

    Args:
        name: of the layer.
        kind_before, kind_after: class of the layer in the original model and as loaded.
        shape: (outputs, inputs); of an embedding (rows, width).
        format: storage format of the weights: ``float32``, ``int8``, ``4-bit`` …
        quantized: whether they are codes with scales.
        reason: why the layer was not quantized.
        nbytes: of its weights, scales and tables included, bias left out.
        bits_per_weight: the same per weight, in bits.
        shared_with: the layer that has the same tensor (the embedding of a tied head), else None.
        relative_error: ‖W′ − W‖ / ‖W‖, Frobenius; None if the checkpoint has no such tensor.
        max_error: largest |W′ − W|.
        sqnr_db: signal to quantization noise, 20 log₁₀ (‖W‖ / ‖W′ − W‖); None if the matrices are equal.
        inputs: what calibration found of the layer's activations; None if it was not calibrated.
    """

    name: str
    kind_before: str
    kind_after: str
    shape: tuple[int, int]
    format: str
    quantized: bool
    reason: str | None
    nbytes: int
    bits_per_weight: float
    shared_with: str | None
    relative_error: float | None
    max_error: float | None
    sqnr_db: float | None
    inputs: InputCalibration | None = None


@dataclass(frozen=True)
class LayerReport:
    """Every matrix of one loaded precision.

    Args:
        quantized_share: quantized fraction of the weights in matrix products, embeddings excluded.
        warning: of ``quantization_warning``.
    """

    precision: str
    layers: tuple[LayerError, ...]
    quantized_share: float
    warning: str | None


@runtime_checkable
class HasModule(Protocol):
    """A runner that computes with PyTorch modules."""

    @property
    def module(self) -> nn.Module: ...


class ModuleLayers(Mapping[str, tuple[str, LayerWeights]]):
    """The layers of PyTorch modules, each described when it is asked for: a description may be a copy."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())

    def __getitem__(self, name: str) -> tuple[str, LayerWeights]:
        module = self._modules[name]
        weights = weights_of(module)
        assert weights is not None, f"{type(module).__name__} has weights that can't be read"
        return type(module).__name__, weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def layers_of(runner: Runner) -> Mapping[str, tuple[str, LayerWeights]] | None:
    """(kind, weights) of a runner's layers by name, among them modules without weights; None if unknown."""
    if isinstance(runner, HasModule):
        return ModuleLayers(runner.module)
    return runner.layers() if isinstance(runner, DescribedLayers) else None


def layer_errors(
    model: LoadedModel,
    spec: ModelSpec,
    progress: Progress = ignore_progress,
    *,
    original: Checkpoint | None = None,
) -> LayerReport | None:
    """Compares every matrix with the checkpoint's; needs a few times the largest layer in float32.

    Args:
        original: whose matrices they are compared with, those of the same name and shape; the spec's
            checkpoint if None. One that was saved quantized has no original weights itself.

    Returns: None if the runner neither has PyTorch modules nor describes its layers.
    """
    layers = layers_of(model.runner)
    if layers is None:
        return None
    before = meta_model(spec)
    reasons = {layer.name: layer.reason for layer in model.footprint.kept}
    names = [name for name in layers if name in reasons or name in model.footprint.quantized]
    found, owners = [], dict[int, str]()
    with Originals(original or spec.checkpoint, before) as originals:
        for done, name in enumerate(names, 1):
            kind, weights = layers[name]
            owner = name if weights.copied else owners.setdefault(weights.weight.data_ptr(), name)
            kinds = type(before.get_submodule(name)).__name__, kind
            matrix = originals.weight(name)
            if matrix is not None and tuple(matrix.shape) != tuple(weights.shape):
                matrix = None  # of another model, pruned or with more rows
            found.append(_layer(name, kinds, weights, matrix, reasons.get(name), owner))
            progress("comparing weights", done, len(names))
    return LayerReport(
        model.precision, tuple(found), model.footprint.quantized_share, quantization_warning(model)
    )


def _layer(
    name: str,
    kinds: tuple[str, str],
    weights: LayerWeights,
    original: Tensor | None,
    reason: str | None,
    owner: str,
) -> LayerError:
    if original is not None and weights.input_scale is not None:
        original = original * weights.input_scale
    none = (None, None, None)
    relative, largest, sqnr = none if original is None else compare(original, weights.dequantize())
    return LayerError(
        name,
        *kinds,
        weights.shape,
        weights.format,
        weights.quantized,
        None if weights.quantized else reason,
        weights.nbytes,
        weights.bits_per_weight,
        None if owner == name else owner,
        relative,
        largest,
        sqnr,
        weights.calibration,
    )


class Originals:
    """The checkpoint's tensors, each read on demand.

    Args:
        checkpoint: its safetensors files.
        model: the same architecture on the meta device, by which tied and transposed tensors are found.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self._model, self._prefix = model, f"{model.base_model_prefix}."
        saved = checkpoint.saved is not None  # its files have codes in the place of the original weights
        self._paths = [] if saved else weight_files(checkpoint.folder, checkpoint.model_id)
        self._files: Mapping[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Originals":
        opened = [self._stack.enter_context(safe_open(path, framework="pt")) for path in self._paths]
        self._files = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def weight(self, layer: str) -> Tensor | None:
        """The (outputs, inputs) float32 matrix; None if the checkpoint has no tensor of a known name."""
        for name in self._names(layer):
            if name in self._files:
                tensor: Tensor = self._files[name].get_tensor(name).to(torch.float32)
                transposed = type(self._model.get_submodule(layer)).__name__ == "Conv1D"
                return tensor.t() if transposed else tensor
        return None

    def _names(self, layer: str) -> Iterator[str]:
        """Possible names of the tensor: a tied head's is its embedding's; older files omit the prefix."""
        own = self._model.get_submodule(layer).weight
        tied = [name for name, one in self._model.named_parameters(remove_duplicate=False) if one is own]
        for name in (f"{layer}.weight", *tied):
            yield name
            yield name.removeprefix(self._prefix)
            yield self._prefix + name
