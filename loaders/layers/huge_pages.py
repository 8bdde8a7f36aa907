"""Memory for weights in pages of 2 MiB.

A decode step reads every weight once, so it is as fast as memory is read; with pages of 4 KiB the core spends
a good part of that time on finding out where the next page is.
"""

import contextlib
import mmap

import torch
from torch import Tensor, nn

_PAGE = 2 << 20
_CHUNK = 32 << 20
_LINE = 64  # bytes; tensors begin on a cache line of their own


class Arena:
    """Keeps tensors side by side, in the order in which they come; free again when the last of them is gone.

    Where the system has no huge pages, or grants none, it gives ordinary ones: nothing else changes.
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
        """Moves what is left of a model: a single tensor still in the file would keep all of it in memory.

        Parameters of a class of their own stay: others may know where they are.
        """
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() not in self._placed and type(tensor) in (nn.Parameter, Tensor):
                tensor.data = self.place(tensor.data)


def _pages(size: int) -> Tensor:
    """At least ``size`` bytes from a page's beginning on; the system takes memory as they are written."""
    size = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # this kernel was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    return everything[-everything.data_ptr() % _PAGE :][:size]
