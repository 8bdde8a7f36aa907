"""The KV cache of continuous batching: one slot per sequence, rows at their own positions.

``transformers``' own forward passes use it unchanged: each layer passes its new keys and values to
``update``, which writes them into the slots of the pass and returns all that those slots hold. There is no
left padding, and no copy when a sequence joins or leaves. Recurrent layers keep theirs in ``SlotStates``.
"""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from loaders.layers.float16_range import overflow_as_nan
from loaders.runners.slot_states import Key, SlotStates


class SlotCache(Cache):
    """Keys and values of ``slots`` sequences of up to ``context`` tokens.

    Per layer two tensors (slots, kv heads, context, head dim), allocated on the layer's first update, in its
    dtype. The host commits their pages only as they are written.
    """

    def __init__(self, slots: int, context: int) -> None:
        super().__init__(layers=[])
        self.slots, self.context = slots, context
        self.lengths = [0] * slots
        """Tokens held by each slot."""
        self._keys: list[Tensor | None] = []
        self._values: list[Tensor | None] = []
        self._rows: slice | Tensor = slice(0, 0)
        self._index: tuple[Tensor, Tensor] | None = None
        self._start = self._end = 0
        self._states = SlotStates(slots)

    def enter(self, slots: Sequence[int], tokens: int, device: torch.device) -> None:
        """Sets up the next forward pass, which appends ``tokens`` tokens to each of ``slots``.

        Raises:
            ValueError: they don't fit.
        """
        starts = [self.lengths[slot] for slot in slots]
        self._end = max(starts) + tokens
        if self._end > self.context:
            raise ValueError(f"{self._end} tokens do not fit a slot of {self.context}")
        self._states.enter(slots, is_fresh=not any(starts))
        self._rows = _as_slice(slots) or torch.tensor(slots, device=device)
        if len(slots) == 1:
            self._index, self._start = None, starts[0]
        else:
            if tokens != 1:
                raise ValueError("several rows advance by one token at a time")
            self._index = torch.tensor(slots, device=device), torch.tensor(starts, device=device)

    def commit(self, slots: Sequence[int], tokens: int) -> None:
        """Adds the tokens of a successful pass to the lengths; those of a failed one are overwritten."""
        self._states.commit()
        for slot in slots:
            self.lengths[slot] += tokens

    def clear(self, slot: int) -> None:
        """Empties and zeroes a slot: a masked key has weight 0, and 0 × NaN is NaN, so NaNs of a broken
        sequence would reach the next one through the padding."""
        for tensor in (*self._keys, *self._values):
            if tensor is not None:
                tensor[slot, :, : self.lengths[slot]] = 0
        self._states.clear(slot)
        self.lengths[slot] = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new (rows, heads, tokens, dim) states; returns all that the rows hold."""
        while len(self._keys) <= layer_idx:
            self._keys.append(None)
            self._values.append(None)
        keys = self._keys[layer_idx]
        values = self._values[layer_idx]
        if keys is None or values is None:
            keys = self._keys[layer_idx] = self._allocate(key_states)
            values = self._values[layer_idx] = self._allocate(value_states)
        return self._write(keys, key_states), self._write(values, value_states)

    def _allocate(self, states: Tensor) -> Tensor:
        shape = (self.slots, states.shape[1], self.context, states.shape[3])
        if states.is_cuda:
            return states.new_zeros(shape)
        # calloc: zero pages, committed when written; torch.zeros would write all of them
        count = math.prod(shape) * states.element_size()
        return torch.from_numpy(np.zeros(count, np.uint8)).view(states.dtype).view(shape)

    def _write(self, cache: Tensor, states: Tensor) -> Tensor:
        rows = self._rows
        if isinstance(rows, Tensor):
            rows = rows.to(cache.device)  # a model may be spread over several cards
        states = overflow_as_nan(states)
        if self._index is None:
            cache[rows, :, self._start : self._end] = states
        else:
            slots, positions = (index.to(cache.device) for index in self._index)
            cache[slots, :, positions] = states[:, :, 0]
        return cache[rows, :, : self._end]

    @property
    def end(self) -> int:
        """Number of keys visible to the longest row of the current pass."""
        return self._end

    def nbytes(self) -> int:
        tensors = (t for t in (*self._keys, *self._values) if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors) + self._states.nbytes()

    def drop(self) -> None:
        self._keys, self._values = [], []
        self._states.drop()

    # Called by recurrent layers, as the methods of transformers' cache of these names.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.read(Key("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self._states.extend(Key("conv", layer_idx, state_idx), conv_states, conv_kernel_size)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.read(Key("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self._states.write(Key("recurrent", layer_idx, state_idx), recurrent_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    # Called by forward passes; with explicit positions and masks the results are not used.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._end, 0


class PassingCache(Cache):
    """Takes the place of a cache that is empty and stays so, so that float16 overflows become NaN."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return overflow_as_nan(key_states), overflow_as_nan(value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return conv_states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name under which the model's forward pass takes a cache; None if it takes none."""
    taken = signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in taken), None)


def _as_slice(slots: Sequence[int]) -> slice | None:
    """The slots as a slice if they are consecutive, so that a view replaces a copy of the cache."""
    first = slots[0]
    if all(slot == first + i for i, slot in enumerate(slots)):
        return slice(first, first + len(slots))
    return None
