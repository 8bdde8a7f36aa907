"""A loaded model's forward pass in float32, over the weights that its layers represent in any format.

For checks of positions and masks: with outliers in the activations, the rounding of int8 activations (and,
in deep models, of bf16) turns a difference of 10⁻⁷ into one of 0.5 in the logits, as large as lost positions
make.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders.layers.layer_weights import LayerWeights, WeightLayer, weights_of
from loaders.layers.linear_layers import is_read_directly
from loaders.layers.native_linear import NativeLinear
from loaders.layers.shared_embedding import SharedEmbedding

_HALF = (torch.bfloat16, torch.float16)
_OF_A_KIND = 2  # layers of a kind that compute
_NUMBER = re.compile(r"idx|index|layer_id|layer_num")
_AT_A_TIME = 2**24  # weights of an unquantized matrix in float32 at a time

Undo = Callable[[], object]


@contextmanager
def full_precision(model: PreTrainedModel) -> Iterator[None]:
    """Within this context the model computes in float32, with the first two layers of each kind.

    Quantized layers multiply with their dequantized weights, one layer at a time; what is in bf16 or fp16 is
    cast while its module computes. Memory: the float32 copy of the largest matrix. The matrix products of
    further layers give zeros, so that the time doesn't grow with their number: what a kind of layer does with
    positions and masks is the same in each. The loaded weights stay as they are.
    """
    skipped = {module for layer in _further_layers(model) for module in layer.modules()}
    with ExitStack() as stack:
        for entry in {model, model.base_model}:  # OPT's forward pass calls a part of its base model alone
            stack.callback(entry.register_forward_pre_hook(_cast_arguments, with_kwargs=True).remove)
        for name, module in model.named_modules():
            if is_read_directly(name):
                stack.enter_context(_cast(module.weight))
            for undo in _prepare(module, module in skipped):
                stack.callback(undo)
        yield


@contextmanager
def _cast(weight: Tensor) -> Iterator[None]:
    before, weight.data = weight.data, weight.data.float()
    try:
        yield
    finally:
        weight.data = before


def _further_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The layers that follow two of their own kind."""
    count = model.config.get_text_config().num_hidden_layers
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            seen: Counter[Any] = Counter()
            for layer in layers:
                seen[kind := _kind(layer)] += 1
                if seen[kind] > _OF_A_KIND:
                    yield layer


def _kind(layer: nn.Module) -> Any:
    """The classes of a layer's modules with their options, such as ``attention_type``; without its number."""
    return tuple(
        (
            name,
            type(module),
            *sorted((key, value) for key, value in vars(module).items() if _is_option(key, value)),
        )
        for name, module in layer.named_modules()
    )


def _is_option(key: str, value: object) -> bool:
    return isinstance(value, bool | int | float | str | None) and not _NUMBER.search(key)


def _prepare(module: nn.Module, skipped: bool) -> Iterator[Undo]:
    """Makes one module compute in float32; yields what restores it."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    halves = [tensor for tensor in own if tensor.dtype in _HALF]
    if isinstance(module, nn.Embedding | SharedEmbedding):
        if halves:
            yield module.register_forward_hook(_cast_result).remove
    elif skipped and isinstance(module, nn.Linear | Conv1D | WeightLayer):
        yield _replace_forward(module, partial(_zeros, _outputs(module)))
    elif _is_linear(module):
        yield _replace_forward(module, partial(_product, module))
    elif halves:
        cast = _CastTensors(halves)
        yield module.register_forward_pre_hook(cast.enter).remove
        yield module.register_forward_hook(cast.leave, always_call=True).remove


def _outputs(module: Any) -> int:
    outputs: int | None = getattr(module, "out_features", None)  # describing its weights may copy them
    if outputs is not None:
        return outputs
    weights = weights_of(module)
    assert weights is not None
    return weights.shape[0]


def _is_linear(module: nn.Module) -> bool:
    """Whether the layer is a matrix product and a bias, in other than float32."""
    weights = weights_of(module)
    if weights is None or weights.format == "float32":
        return False
    # a subclass of an unquantized layer may compute otherwise
    return weights.quantized or type(module) in (nn.Linear, Conv1D, NativeLinear)


def _replace_forward(module: Any, forward: Callable[[Tensor], Tensor]) -> Undo:
    before = module.__dict__.get("forward")  # a library that moves activations between devices sets its own

    def restore() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    module.forward = forward
    return restore


def _zeros(outputs: int, x: Tensor) -> Tensor:
    return x.new_zeros((*x.shape[:-1], outputs), dtype=torch.float32)


def _product(module: Any, x: Tensor) -> Tensor:
    weights = weights_of(module)
    assert weights is not None
    x = x.to(weights.weight.device, torch.float32)
    found = torch.cat([functional.linear(x, part) for part in _parts(weights)], dim=-1)
    return found if module.bias is None else found + module.bias.float()


def _parts(weights: LayerWeights) -> Iterator[Tensor]:
    """The float32 matrix by rows: an output head in bf16 may be gigabytes in float32."""
    if weights.quantized:
        yield weights.dequantize()
        return
    for part in weights.weight.split(max(1, _AT_A_TIME // weights.shape[1])):
        yield part.float()


class _CastTensors:
    """Casts a module's own tensors for the time of its forward pass."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._before: list[Tensor] = []

    def enter(self, module: nn.Module, arguments: Any) -> None:
        self._before = [tensor.data for tensor in self._tensors]
        for tensor in self._tensors:
            tensor.data = tensor.data.float()

    def leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        for tensor, before in zip(self._tensors, self._before, strict=True):
            tensor.data = before
        self._before = []


def _cast_result(module: nn.Module, arguments: Any, result: Tensor) -> Tensor:
    return result.float()


def _cast_arguments(module: nn.Module, arguments: Any, named: Any) -> Any:
    """Masks are in the type of the model. A cache is no tree: transformers' exporters register it as one."""
    return tree_map_only(
        Tensor,
        lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor,
        (arguments, named),
        is_leaf=lambda one: isinstance(one, Cache),
    )
