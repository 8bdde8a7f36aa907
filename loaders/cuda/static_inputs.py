"""The static input tensors of captured steps, filled by one copy to the device or advanced on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loaders.cuda.pinned import send_into
from loaders.cuda.static_cache import StaticCache


class DecodeInputs:
    """Inputs of a decode step, in which row i is slot i. All int64."""

    def __init__(self, cache: StaticCache, device: torch.device) -> None:
        self._padding_index = [cache.padding_index(row) for row in range(cache.slots)]
        self._all = torch.zeros((5, cache.slots), dtype=torch.int64, device=device)
        self.ids, self.positions, self.where, self._onward, self._slots = self._all
        self._moving = self._all[1:3]  # positions and where; _onward is 1 for rows that decode
        self._first = self.ids[:0]
        self._sent: tuple[list[int], list[int]] | None = None  # slots, lengths; None: unknown
        self.chosen = self._slots[:0]
        """The slots in the order of the call, (count,)."""
        self.in_order = True
        """Whether they are the first slots, ascending."""

    def fill(
        self, cache: StaticCache, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """``lengths``: tokens that each of ``slots`` holds. Rows of other slots are padding."""
        now, self._sent = (list(slots), list(lengths)), None
        nothing = [0] * len(self._padding_index)
        row_ids, positions, where, onward = nothing[:], nothing[:], self._padding_index[:], nothing[:]
        for slot, id_, length in zip(slots, ids, lengths, strict=True):
            row_ids[slot], positions[slot], onward[slot] = id_, length, 1
            where[slot] = cache.place(slot, length)
        send_into(self._all, [row_ids, positions, where, onward, [*slots, *nothing[len(slots) :]]])
        self.chosen, self._first = self._slots[: len(slots)], self.ids[: len(slots)]
        self.in_order = now[0] == list(range(len(slots)))
        self._sent = now

    def fill_from(
        self, cache: StaticCache, slots: Sequence[int], tokens: Tensor, lengths: Sequence[int]
    ) -> None:
        """``fill`` with ids that are already on the device, (count,).

        Usually each slot holds one token more than in the previous step, and nothing is sent. Other lengths
        mean that a step is retried, or that a slot has been reused; then all inputs are sent.
        """
        if self._sent == (slots, [length - 1 for length in lengths]):
            self._sent = None
            self._moving.add_(self._onward)
            self._sent = list(slots), list(lengths)
        else:
            self.fill(cache, slots, [0] * len(slots), lengths)
        if self.in_order:
            self._first.copy_(tokens)
        else:
            self.ids.index_copy_(0, self.chosen, tokens)


class PromptInputs:
    """Inputs of a chunk of one slot's prompt. All int64."""

    def __init__(self, cache: StaticCache, tokens: int, device: torch.device) -> None:
        self._padding_index = [cache.padding_index(row) for row in range(tokens)]
        self._all = torch.zeros((3, tokens), dtype=torch.int64, device=device)
        self._which = torch.zeros((2, 1), dtype=torch.int64, device=device)
        self.ids, self.positions, self.where = self._all
        self.slot, self.last = self._which

    def fill(self, cache: StaticCache, slot: int, ids: Sequence[int], start: int, tokens: int) -> None:
        """``ids`` follow the ``start`` tokens of the slot; the rest of ``tokens`` is padding."""
        count, first = len(ids), cache.place(slot, start)  # the indices of a slot are consecutive
        padding = [0] * (len(self._padding_index) - count)
        positions = [*range(start, start + count), *padding]
        where = [*range(first, first + count), *self._padding_index[: len(padding)]]
        send_into(self._all, [[*ids, *padding], positions, where])
        send_into(self._which, [[slot], [count - 1]])
