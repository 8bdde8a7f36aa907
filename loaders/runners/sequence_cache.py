"""The cache of one sequence, of whatever kind its model's layers keep."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from loaders.layers.float16_range import overflow_as_nan


class SequenceCache(DynamicCache):
    """``transformers``' growing cache of keys and values, or of the state of recurrent layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends the new (1, heads, tokens, dim) states; returns all that the layer attends to."""
        while len(self.layers) <= layer_idx:  # a decoder deeper than its encoder, whose layers count
            self.layers.append(DynamicLayer())
        keys, values = overflow_as_nan(key_states), overflow_as_nan(value_states)
        found: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return found

    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(vars(layer).values()))

    def sizes(self) -> tuple[float, int]:
        """Bytes per token, and those of state that doesn't grow."""
        pairs = ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in self.layers)
        growing = [tensor for pair in pairs for tensor in pair if tensor is not None and tensor.numel()]
        per_token = sum(tensor.nbytes / tensor.shape[-2] for tensor in growing)
        return per_token, self.nbytes() - sum(tensor.nbytes for tensor in growing)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in [*values]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
