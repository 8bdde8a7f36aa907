"""The weights of a layer: their format, their bytes, and the float32 matrix that they represent.

A layer class of this package describes its weights in a method ``layer_weights``. Classes of other libraries
are registered with ``weights_of``: those of PyTorch and transformers here, bitsandbytes' in its adapters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weight matrix as it is in memory; biases are left out.

    Args:
        format: ``float32``, ``int8``, ``4-bit`` …
        shape: (outputs, inputs); of an embedding (rows, width).
        weight: the values, or the codes of a quantized matrix, in any layout.
        dequantize: returns the float32 matrix of ``shape``, on the device of ``weight``.
        state: (role, tensor) pairs that describe the quantization (scales, absmax, tables …); none of a
            matrix that is not quantized.
        copied: the tensors are copies that were made for this description: no other layer shares them.
        input_scale: (inputs,) factors by which the original weights were multiplied before quantization, as
            those of ``fold_norms``; None if they weren't.
    """

    format: str
    shape: tuple[int, int]
    weight: Tensor
    dequantize: Callable[[], Tensor]
    state: Sequence[tuple[str, Tensor]] = ()
    copied: bool = False
    input_scale: Tensor | None = None

    @property
    def quantized(self) -> bool:
        return bool(self.state)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + sum(tensor.nbytes for _, tensor in self.state)

    @property
    def bits(self) -> int:
        """Of one code; ``bits_per_weight`` counts scales and tables as well."""
        return 8 * self.weight.nbytes // math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)


@runtime_checkable
class WeightLayer(Protocol):
    """A layer that describes its own weights."""

    def layer_weights(self) -> LayerWeights: ...


@singledispatch
def weights_of(module: nn.Module) -> LayerWeights | None:
    """The weights of a linear layer or an embedding; None for a module without a weight matrix."""
    return module.layer_weights() if isinstance(module, WeightLayer) else None


def dense(weight: Tensor) -> LayerWeights:
    """Weights of a (outputs, inputs) matrix of floats."""
    outputs, inputs = weight.shape
    return LayerWeights(str(weight.dtype).removeprefix("torch."), (outputs, inputs), weight, weight.float)


@weights_of.register(nn.Linear)
@weights_of.register(nn.Embedding)
def _(module: Any) -> LayerWeights:
    return dense(module.weight.detach())


@weights_of.register(Conv1D)
def _(module: Any) -> LayerWeights:
    return dense(module.weight.detach().t())


@runtime_checkable
class DescribedLayers(Protocol):
    """A runner without PyTorch modules that describes the matrices of its layers itself."""

    def layers(self) -> Mapping[str, tuple[str, LayerWeights]]:
        """(kind, weights) by the names that the layers have in the checkpoint's model."""
        ...
