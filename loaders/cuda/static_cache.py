"""A KV cache of static tensors for captured steps: every address and shape is fixed.

One tensor (layers, 2, slots + 1, columns, heads, width) holds all of it. The last slot is a dummy, which
is never read: padding rows of a captured step write to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from loaders.errors import LoaderError
from loaders.layers.float16_range import overflow_as_nan


class Unsuitable(LoaderError):
    """A model that ``GraphRunner`` can't serve; the message gives the reason."""


@dataclass(frozen=True)
class Shape:
    """Keys and values of one token."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.heads * self.width * self.dtype.itemsize


class ShapeProbe(Cache):
    """Takes the place of a cache in one forward pass and records the shapes of keys and values."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._seen: list[tuple[tuple[int, int], tuple[int, int], torch.dtype, torch.device]] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        widths = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
        self._seen.append((*widths, keys.dtype, keys.device))
        return keys, values

    def put(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """``StaticCache.put`` of one row."""
        keys, values = states.unbind(1)  # (tokens, heads, width)
        return self.update(keys[None].transpose(1, 2), values[None].transpose(1, 2), layer)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def shape(self) -> Shape:
        """Raises Unsuitable if layers, or keys and values, differ in shape."""
        if not self._seen or len(set(self._seen)) > 1 or self._seen[0][0] != self._seen[0][1]:
            raise Unsuitable("its layers don't all keep keys and values of one shape on one device")
        (heads, width), _, dtype, device = self._seen[0]
        return Shape(len(self._seen), heads, width, dtype, device)


class StaticCache(Cache):
    """Keys and values of ``slots`` sequences of up to ``columns`` tokens."""

    def __init__(self, shape: Shape, slots: int, columns: int) -> None:
        super().__init__(layers=[])
        self.slots, self.columns = slots, columns
        full = (shape.layers, 2, slots + 1, columns, shape.heads, shape.width)
        self._all = torch.zeros(full, dtype=shape.dtype, device=shape.device)
        self._flat = self._all.view(shape.layers, 2, (slots + 1) * columns, shape.heads, shape.width)
        self._where = self._rows = self._all.new_zeros(0, dtype=torch.int64)
        self._count, self._visible = 0, columns

    def place(self, slot: int, position: int) -> int:
        """The index of a token's position, for ``begin``."""
        return slot * self.columns + position

    def padding_index(self, row: int) -> int:
        """The index in the dummy slot that a padding row writes to; rows share one only if they must."""
        return self.slots * self.columns + row % self.columns

    def begin(self, where: Tensor, rows: int | Tensor, visible: int) -> None:
        """Sets up a forward pass. It reads the tensors while computing, so a replay sees their new contents.

        Args:
            where: (rows × tokens,) int64, the indices of the new tokens.
            rows: the number of slots, from the first; or one slot, as a (1,) int64 tensor.
            visible: the number of columns that it attends to.
        """
        self._where, self._visible = where, visible
        self._count, self._rows = (rows, self._rows) if isinstance(rows, int) else (0, rows)

    def put(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (rows × tokens, 2, heads, width) keys and values; returns all that the rows hold.

        Returns keys and values, each (rows, heads, visible, width).
        """
        self._flat[layer].index_copy_(1, self._where, overflow_as_nan(states).transpose(0, 1))
        return self._held(layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """``put`` for ``transformers``: keys and values as two tensors, (rows, heads, tokens, width)."""
        for store, states in zip(self._flat[layer_idx], (key_states, value_states), strict=True):
            store.index_copy_(0, self._where, overflow_as_nan(states).transpose(1, 2).flatten(0, 1))
        return self._held(layer_idx)

    def _held(self, layer: int) -> tuple[Tensor, Tensor]:
        if self._count:
            held = self._all[layer, :, : self._count, : self._visible]
        else:
            held = self._all[layer, :, :, : self._visible].index_select(1, self._rows)
        keys, values = held.transpose(2, 3)
        return keys, values

    def clear(self, slot: int, tokens: int) -> None:
        """Zeroes a slot. A masked key has weight 0, and 0 × NaN is NaN: NaNs of a broken sequence would
        reach the next one in the slot."""
        self._all[:, :, slot, :tokens].zero_()

    @property
    def nbytes(self) -> int:
        return self._all.nbytes

    # Called by forward passes; with explicit positions and masks the results are not used.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._visible, 0
