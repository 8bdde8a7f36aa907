"""A loaded model's bytes, counted from its tensors, and which of its matrices are quantized."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders.base import DTYPES, Footprint, KeptLayer, LoadedModel
from loaders.layers.layer_weights import LayerWeights, weights_of
from loaders.layers.shared_embedding import SharedEmbedding

Reason = Callable[[nn.Module], str]
"""Returns why the matrices of a module were not quantized."""


def measure(
    model: PreTrainedModel,
    parameters: int,
    reason: Reason = lambda module: "this precision quantizes nothing",
) -> Footprint:
    """Counts the bytes of a model, each storage once: tied weights and shared tables don't count twice.

    Args:
        parameters: of the checkpoint, a tied head counted once.
        reason: why a module's matrices were not quantized.
    """
    bytes_ = _Bytes()
    state: dict[str, int] = defaultdict(int)
    quantized, kept = [], []
    multiplied: dict[bool, int] = defaultdict(int)
    for name, module in model.named_modules():
        if (weights := weights_of(module)) is None:
            for matrix, size in _own_matrices(name, module):
                kept.append(KeptLayer(matrix, reason(module)))
                multiplied[False] += size
            continue
        bytes_.count(weights.weight)
        for role, tensor in weights.state:
            state[role] += bytes_.count(tensor)
        if weights.quantized:
            quantized.append(name)
        else:
            kept.append(KeptLayer(name, reason(module)))
        if not isinstance(module, nn.Embedding | SharedEmbedding):
            multiplied[weights.quantized] += math.prod(weights.shape)
    for tensor in (*model.parameters(), *model.buffers()):
        for plain in plain_tensors(tensor):
            bytes_.count(plain)
    total = sum(bytes_.by_dtype.values())
    return Footprint(
        weights_bytes=total,
        by_dtype=dict(bytes_.by_dtype),
        quantization_state=dict(state),
        transformers_footprint_bytes=int(model.get_memory_footprint()),
        bits_per_weight=8 * total / parameters,
        parameters=parameters,
        lookup_bytes=_lookup_bytes(model),
        quantized=quantized,
        kept=kept,
        quantized_share=multiplied[True] / max(1, sum(multiplied.values())),
    )


def measure_layers(
    layers: Mapping[str, LayerWeights], by_dtype: Mapping[str, int], model: PreTrainedModel, reason: Reason
) -> Footprint:
    """The footprint of a model without PyTorch modules.

    Args:
        layers: by name, as in ``model``.
        by_dtype: bytes of all that the forward pass reads.
        model: the checkpoint's, on the meta device.
    """
    state: dict[str, int] = defaultdict(int)
    multiplied: dict[bool, int] = defaultdict(int)
    counted, looked_up = _Bytes(), 0
    for name, weights in layers.items():
        for role, tensor in weights.state:
            state[role] += counted.count(tensor)
        if isinstance(model.get_submodule(name), nn.Embedding):
            looked_up += weights.weight.nbytes
        else:
            multiplied[weights.quantized] += math.prod(weights.shape)
    total, parameters = sum(by_dtype.values()), count_parameters(model)
    return Footprint(
        weights_bytes=total,
        by_dtype=dict(by_dtype),
        quantization_state=dict(state),
        transformers_footprint_bytes=total - sum(state.values()),
        bits_per_weight=8 * total / parameters,
        parameters=parameters,
        lookup_bytes=looked_up,
        quantized=[name for name, weights in layers.items() if weights.quantized],
        kept=[
            KeptLayer(name, reason(model.get_submodule(name)))
            for name, weights in layers.items()
            if not weights.quantized
        ],
        quantized_share=multiplied[True] / max(1, sum(multiplied.values())),
    )


def reasons(model: PreTrainedModel, of_head: str, of_others: str = "the architecture keeps it") -> Reason:
    """The reasons of a precision that quantizes linear layers.

    Args:
        of_head, of_others: the output head's, and that of linear layers beside it.
    """
    head = model.get_output_embeddings()

    def reason(module: nn.Module) -> str:
        if isinstance(module, nn.Embedding):
            return "the embedding is looked up, not multiplied"
        if module is head:
            return of_head
        if weights_of(module) is None:
            return "it is not a linear layer by itself"
        return of_others

    return reason


def linear_weights(model: PreTrainedModel) -> int:
    """Number of weights in all linear layers but the head: those that a precision quantizes."""
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return sum(layer.weight.numel() for layer in layers)


def _own_matrices(name: str, module: nn.Module) -> Iterator[tuple[str, int]]:
    """(name, weights) of matrices that are no layer's, such as the experts of a mixture in one tensor."""
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2:
            yield f"{name}.{own}", parameter.numel()


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the data of one: several, if it is of a class that wraps others."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


class _Bytes:
    """Bytes by element type, each storage counted once."""

    def __init__(self) -> None:
        self.by_dtype: dict[str, int] = defaultdict(int)
        self._seen: dict[tuple[int, int], Tensor] = {}  # kept alive, so that no address is used twice

    def count(self, tensor: Tensor) -> int:
        """Returns the bytes that were added: 0 if the tensor was counted before."""
        key = (tensor.data_ptr(), tensor.nbytes)
        if not tensor.numel() or key in self._seen:
            return 0
        self._seen[key] = tensor
        self.by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        return tensor.nbytes


def _lookup_bytes(model: nn.Module) -> int:
    """Bytes of embeddings that are in no matrix product, as a tied head's would be."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    others = (m for m in model.modules() if not isinstance(m, nn.Embedding))
    multiplied = {tensor.data_ptr() for module in others for tensor in module.parameters(recurse=False)}
    looked_up = {m.weight.data_ptr(): m.weight.nbytes for m in embeddings}
    return sum(size for where, size in looked_up.items() if where not in multiplied)


def count_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


_LEAST_QUANTIZED = 0.5  # fraction of the linear weights below which the warning is given


def quantization_warning(model: LoadedModel) -> str | None:
    """The warning for a quantizing precision that left most linear weights as they were; else None."""
    share = model.footprint.quantized_share
    unquantized = model.precision.rpartition("-")[2] in DTYPES  # fp32, onnx-fp32 …
    if unquantized or share >= _LEAST_QUANTIZED:
        return None
    return (
        f"{model.precision} has quantized only {share:.0%} of this model's linear weights: "
        "expect little of its memory and speed"
    )
