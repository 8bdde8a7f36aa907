"""Blocks outside every pool, for texts that are scored without a slot; they count in the budget."""

from contextlib import AbstractContextManager

from loaders.kv_cache.budget import KVBudget


class ScratchBlocks(AbstractContextManager[None]):
    """While the context is entered, ``held_blocks`` blocks of the budget are in use. A ``Member`` of it.

    Raises:
        MemoryError: on entering, the budget has no room for them, even without cached blocks.
    """

    def __init__(self, budget: KVBudget, blocks: int, block_bytes: int) -> None:
        self.block_bytes, self.held_blocks = block_bytes, 0
        self.unreturned_blocks = self.idle_blocks = 0
        self.oldest_idle: int | None = None
        self._budget, self._blocks = budget, blocks

    def __enter__(self) -> None:
        with self._budget.lock:
            if not self._budget.make_room(self, self._blocks * self.block_bytes):
                raise MemoryError(f"the KV cache has no room for {self._blocks} blocks of a text to score")
            self.held_blocks = self._blocks
            self._budget.join(self)

    def __exit__(self, *_: object) -> None:
        self._budget.leave(self)

    def evict(self) -> None:
        raise AssertionError("there is no cached block")

    def return_memory(self, blocks: int) -> None:
        raise AssertionError("there is no free block")
