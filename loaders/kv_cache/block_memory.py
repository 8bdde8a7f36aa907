"""The memory of KV blocks: reserved at once, committed as it is written, and given back by block."""

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


class BlockMemory:
    """``blocks`` blocks of ``block_bytes`` each.

    Args:
        block_bytes: a multiple of the page size.

    Raises:
        MemoryError: the system refuses the reservation.
    """

    def __init__(self, blocks: int, block_bytes: int) -> None:
        assert block_bytes % PAGE == 0, block_bytes
        self.block_bytes = block_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._memory = mmap.mmap(-1, max(1, blocks) * block_bytes, flags=flags)
        except OSError as error:
            raise MemoryError(f"no address space for {blocks} KV blocks of {block_bytes} bytes") from error
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address: int = self._bytes.data_ptr()

    def block(self, block: int, dtype: torch.dtype) -> Tensor:
        """The block's elements, flat, as a view."""
        return self._bytes[block * self.block_bytes : (block + 1) * self.block_bytes].view(dtype)

    def release(self, blocks: Iterable[int]) -> None:
        """Returns the memory of blocks to the system; they read as zeros until they are written again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for first, count in _runs(sorted(blocks)):
            self._memory.madvise(mmap.MADV_DONTNEED, first * self.block_bytes, count * self.block_bytes)


def _runs(numbers: list[int]) -> Iterable[tuple[int, int]]:
    """(first, count) of consecutive ascending numbers."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], i - start
            start = i
