"""The blocks of one pool as a member of the budget: taken, given back, evicted, their memory returned."""

from collections.abc import Callable, Sequence

from loaders.kv_cache.budget import KVBudget
from loaders.kv_cache.prefix_index import PrefixIndex


class Allocator:
    """Free blocks, and cached ones that become free on demand. Every call is made under the budget's lock.

    Args:
        blocks: ids are 0 … ``blocks`` − 1.
        index: the cached blocks.
        on_release: is called with free blocks whose memory is to be returned, until ``close``.
    """

    def __init__(
        self,
        blocks: int,
        block_bytes: int,
        budget: KVBudget,
        index: PrefixIndex,
        on_release: Callable[[Sequence[int]], None],
    ) -> None:
        self.blocks, self.block_bytes, self.evictions = blocks, block_bytes, 0
        self._budget, self._index, self._on_release = budget, index, on_release
        self._returned: list[int] = [*range(blocks - 1, -1, -1)]  # free, without memory; low ids first
        self._unreturned: list[int] = []  # free, and still with memory
        budget.join(self)

    @property
    def available(self) -> int:
        """Blocks that ``take`` can give, by evicting cached ones where there is no other."""
        new = min(len(self._returned), self._budget.obtainable(self) // self.block_bytes)
        return len(self._unreturned) + self._index.idle + new

    def take(self) -> int:
        """One block; there are ``available`` ones."""
        if not self._unreturned:
            if self._returned and self._budget.make_room(self, self.block_bytes):
                return self._returned.pop()
            self.evict()
        return self._unreturned.pop()

    def give(self, blocks: Sequence[int]) -> None:
        """Makes blocks free that no slot uses and that are not indexed."""
        self._unreturned.extend(blocks)

    def widen(self, block_bytes: int) -> bool:
        """Sets the size of a block; False if the budget has no room. Cached blocks are evicted."""
        while self._index.idle:
            self.evict()
        self.return_memory(len(self._unreturned))
        if not self._budget.make_room(self, self.held_blocks * (block_bytes - self.block_bytes)):
            return False
        self.block_bytes = block_bytes
        return True

    def close(self) -> None:
        self._on_release = lambda blocks: None
        self._budget.leave(self)

    # what the budget calls, also for other pools

    @property
    def held_blocks(self) -> int:
        return self.blocks - len(self._returned) - len(self._unreturned)

    @property
    def unreturned_blocks(self) -> int:
        return len(self._unreturned)

    @property
    def idle_blocks(self) -> int:
        return self._index.idle

    @property
    def oldest_idle(self) -> int | None:
        return self._index.oldest.idle_since if self._index.idle else None

    def evict(self) -> None:
        self._unreturned.append(self._index.evict())
        self.evictions += 1

    def return_memory(self, blocks: int) -> None:
        chosen = sorted(self._unreturned[:blocks])
        if chosen:
            del self._unreturned[:blocks]
            self._on_release(chosen)
            self._returned.extend(reversed(chosen))
