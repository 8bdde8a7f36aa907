"""What a captured step reads: tensors made once. They are filled anew by one copy to the device, or moved on
by a token where they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loaders.cuda.pinned import send_into
from loaders.cuda.static_cache import StaticCache


class DecodeInputs:
    """Of a decode step: row i is slot i. All int64."""

    def __init__(self, cache: StaticCache, device: torch.device) -> None:
        self._padding_index = [cache.padding_index(row) for row in range(cache.slots)]
        self._all = torch.zeros((5, cache.slots), dtype=torch.int64, device=device)
        self.ids, self.positions, self.where, self._onward, self._slots = self._all
        self._moving = self._all[1:3]  # positions and where, to which _onward adds one token of somebody's
        self._first = self.ids[:0]
        self._there: tuple[list[int], list[int]] | None = None  # what lies on the device; None: nobody knows
        self.chosen = self._slots[:0]
        """The slots in the order in which they were named, (count,)."""
        self.in_order = True
        """Whether those are the first slots, ascending."""

    def fill(
        self, cache: StaticCache, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """``lengths``: tokens that each of ``slots`` holds. The rows of other slots are nobody's."""
        there, self._there = (list(slots), list(lengths)), None
        nothing = [0] * len(self._padding_index)
        row_ids, positions, where, onward = nothing[:], nothing[:], self._padding_index[:], nothing[:]
        for slot, id_, length in zip(slots, ids, lengths, strict=True):
            row_ids[slot], positions[slot], onward[slot] = id_, length, 1
            where[slot] = cache.place(slot, length)
        send_into(self._all, [row_ids, positions, where, onward, [*slots, *nothing[len(slots) :]]])
        self.chosen, self._first = self._slots[: len(slots)], self.ids[: len(slots)]
        self.in_order = there[0] == list(range(len(slots)))
        self._there = there

    def fill_from(
        self, cache: StaticCache, slots: Sequence[int], tokens: Tensor, lengths: Sequence[int]
    ) -> None:
        """``fill`` with the ids from where they were picked, (count,).

        As a rule each slot holds one token more than in the step before, and nothing need be sent. Lengths
        tell: where they are as they were before, a step is tried again; else a slot has had other guests.
        """
        if self._there == (slots, [length - 1 for length in lengths]):
            self._there = None
            self._moving.add_(self._onward)
            self._there = list(slots), list(lengths)
        else:
            self.fill(cache, slots, [0] * len(slots), lengths)
        if self.in_order:
            self._first.copy_(tokens)
        else:
            self.ids.index_copy_(0, self.chosen, tokens)


class PromptInputs:
    """Of a chunk of one slot's prompt. All int64."""

    def __init__(self, cache: StaticCache, tokens: int, device: torch.device) -> None:
        self._padding_index = [cache.padding_index(row) for row in range(tokens)]
        self._all = torch.zeros((3, tokens), dtype=torch.int64, device=device)
        self._which = torch.zeros((2, 1), dtype=torch.int64, device=device)
        self.ids, self.positions, self.where = self._all
        self.slot, self.last = self._which

    def fill(self, cache: StaticCache, slot: int, ids: Sequence[int], start: int, tokens: int) -> None:
        """``ids`` go behind the ``start`` tokens of the slot; the rest of ``tokens`` is padding."""
        count, first = len(ids), cache.place(slot, start)  # a slot's places lie side by side
        padding = [0] * (len(self._padding_index) - count)
        positions = [*range(start, start + count), *padding]
        where = [*range(first, first + count), *self._padding_index[: len(padding)]]
        send_into(self._all, [[*ids, *padding], positions, where])
        send_into(self._which, [[slot], [count - 1]])
