"""A loaded model's bytes, counted from the tensors that exist, and which of its matrices are quantized."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders.base import DTYPES, Footprint, KeptLayer, LoadedModel
from loaders.layers.layer_weights import weights_of

Reason = Callable[[nn.Module], str]
"""Why a layer's matrix, or one that is no layer's, was kept."""


def measure(
    model: PreTrainedModel,
    parameters: int,
    reason: Reason = lambda module: "this precision quantizes nothing",
) -> Footprint:
    """Counts each storage once, tied weights and shared tables included.

    Args:
        parameters: of the checkpoint, a tied head counted once.
        reason: why this module's matrices were kept.
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
        if not isinstance(module, nn.Embedding):
            multiplied[weights.quantized] += math.prod(weights.shape)
    for tensor in (*model.parameters(), *model.buffers()):
        bytes_.count(tensor)
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


def reasons(model: PreTrainedModel, of_head: str) -> Reason:
    """Why a precision that quantizes linear layers kept one, an embedding, or a matrix that is no layer."""
    head = model.get_output_embeddings()

    def reason(module: nn.Module) -> str:
        if isinstance(module, nn.Embedding):
            return "the embedding is looked up, not multiplied"
        if module is head:
            return of_head
        if weights_of(module) is None:
            return "it is not a linear layer by itself"
        return "the architecture keeps it"

    return reason


def linear_weights(model: PreTrainedModel) -> int:
    """Weights of all linear layers but the head, which is what quantizing a model is about."""
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return sum(layer.weight.numel() for layer in layers)


def _own_matrices(name: str, module: nn.Module) -> Iterator[tuple[str, int]]:
    """What a module multiplies with by itself, such as a mixture's experts in one tensor: name, weights."""
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2:
            yield f"{name}.{own}", parameter.numel()


class _Bytes:
    """Bytes by element type; a storage that was counted counts no more."""

    def __init__(self) -> None:
        self.by_dtype: dict[str, int] = defaultdict(int)
        self._seen: dict[tuple[int, int], Tensor] = {}  # kept alive, so that no address is given out twice

    def count(self, tensor: Tensor) -> int:
        """What the tensor adds."""
        key = (tensor.data_ptr(), tensor.nbytes)
        if not tensor.numel() or key in self._seen:
            return 0
        self._seen[key] = tensor
        self.by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        return tensor.nbytes


def _lookup_bytes(model: nn.Module) -> int:
    """Bytes of embeddings that no layer multiplies with, as a tied head would."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    others = (m for m in model.modules() if not isinstance(m, nn.Embedding))
    multiplied = {tensor.data_ptr() for module in others for tensor in module.parameters(recurse=False)}
    looked_up = {m.weight.data_ptr(): m.weight.nbytes for m in embeddings}
    return sum(size for where, size in looked_up.items() if where not in multiplied)


def count_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


_LEAST_QUANTIZED = 0.5  # a share of the linear weights below which "quantized" is hardly the word


def quantization_warning(model: LoadedModel) -> str | None:
    """What to say, loudly, of a precision that calls itself quantized and hardly is; None of any other."""
    share = model.footprint.quantized_share
    if model.precision in DTYPES or share >= _LEAST_QUANTIZED:
        return None
    return (
        f"{model.precision} has quantized only {share:.0%} of this model's linear weights: "
        "expect little of its memory and speed"
    )
