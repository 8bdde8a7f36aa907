"""Memory for weights in pages of 2 MiB.

A decode step reads every weight once and is bound by memory bandwidth; with pages of 4 KiB, translating
addresses takes a good part of its time.
"""

import contextlib
import mmap

import torch
from torch import Tensor, nn

_PAGE = 2 << 20
_CHUNK = 32 << 20
_LINE = 64  # bytes; tensors are aligned to cache lines


class Arena:
    """Places tensors contiguously in chunks; a chunk is freed with the last of its tensors.

    Where the system provides no huge pages, ordinary ones are used.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._placed: set[int] = set()

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a CPU tensor; shape and type are the same."""
        if not tensor.numel():
            return tensor
        if self._used + tensor.nbytes > len(self._chunk):
            self._chunk, self._used = _pages(max(tensor.nbytes, _CHUNK)), 0
        place = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += -(-tensor.nbytes // _LINE) * _LINE
        self._placed.add(place.data_ptr())
        return place.copy_(tensor)

    def move_remaining(self, model: nn.Module) -> None:
        """Moves the other tensors of a model: one left in the mapped file would keep all of it in memory.

        Parameters of a subclass stay: other code may hold their addresses.
        """
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() not in self._placed and type(tensor) in (nn.Parameter, Tensor):
                tensor.data = self.place(tensor.data)


def _pages(size: int) -> Tensor:
    """At least ``size`` bytes, aligned to a huge page; memory is allocated as they are written."""
    size = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    return everything[-everything.data_ptr() % _PAGE :][:size]
