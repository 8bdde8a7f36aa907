"""What a captured step reads: tensors made once and filled anew, by one copy to the device for each step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loaders.static_cache import StaticCache


class DecodeInputs:
    """Of a decode step: row i is slot i. All int64."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._all = torch.zeros((4, slots), dtype=torch.int64, device=device)
        self.ids, self.positions, self.where, self._slots = self._all
        self._count = 0

    def fill(
        self, cache: StaticCache, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """``lengths``: tokens that each slot of the cache holds. Rows that aren't named are nobody's."""
        count = self._all.shape[1]
        rows = [[0] * count, [0] * count, [cache.nowhere(row) for row in range(count)], [0] * count]
        for index, (slot, id_) in enumerate(zip(slots, ids, strict=True)):
            rows[0][slot], rows[1][slot] = id_, lengths[slot]
            rows[2][slot] = cache.place(slot, lengths[slot])
            rows[3][index] = slot
        _send(rows, self._all)
        self._count = len(slots)

    def take(self, tokens: Tensor) -> None:
        """The ids from where they were picked, in the order of the slots that ``fill`` was told."""
        self.ids.index_copy_(0, self.chosen(self._count), tokens)

    def chosen(self, count: int) -> Tensor:
        """The slots that ``fill`` was told, (count,)."""
        chosen: Tensor = self._slots[:count]
        return chosen


class PromptInputs:
    """Of a stretch of one slot's prompt. All int64."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._all = torch.zeros((3, tokens), dtype=torch.int64, device=device)
        self._which = torch.zeros((2, 1), dtype=torch.int64, device=device)
        self.ids, self.positions, self.where = self._all
        self.slot, self.last = self._which

    def fill(self, cache: StaticCache, slot: int, ids: Sequence[int], start: int, tokens: int) -> None:
        """``ids`` go behind the ``start`` tokens of the slot; the rest of ``tokens`` is padding."""
        count, rest = len(ids), self._all.shape[1] - len(ids)
        _send(
            [
                [*ids, *[0] * rest],
                [*range(start, start + count), *[0] * rest],
                [cache.place(slot, start + i) for i in range(count)]
                + [cache.nowhere(i) for i in range(rest)],
            ],
            self._all,
        )
        _send([[slot], [count - 1]], self._which)


def _send(rows: list[list[int]], target: Tensor) -> None:
    """Without waiting: pinned memory is given out again only when the copy from it is over."""
    values = torch.tensor(rows, dtype=torch.int64, pin_memory=target.is_cuda)
    target.copy_(values, non_blocking=True)
