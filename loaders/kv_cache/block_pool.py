"""Which blocks of a KV cache hold a slot's tokens, which are shared, cached or free. No tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loaders.kv_cache.allocator import Allocator
from loaders.kv_cache.budget import KVBudget
from loaders.kv_cache.prefix_index import BLOCK_TOKENS, Node, PrefixIndex
from loaders.kv_cache.slot import Slot

__all__ = ["BLOCK_TOKENS", "BlockPool", "CacheTooSmall", "PoolStats"]


class CacheTooSmall(MemoryError):
    """The budget doesn't hold one sequence of the full context."""


@dataclass(frozen=True)
class PoolStats:
    """A pool's state."""

    blocks: int
    block_bytes: int
    used: int
    """Blocks of running sequences; a shared one counts once."""
    cached: int
    """Blocks that no sequence uses now, kept for texts that begin with theirs."""
    queried_tokens: int
    """Prompt tokens that were looked for in the cache, by sequences that were computed."""
    hit_tokens: int
    """Of these, tokens that were found."""
    evictions: int
    """Cached blocks that were dropped to make room."""


class BlockPool:
    """The blocks of one runner's KV cache, of ``BLOCK_TOKENS`` tokens each, with ids 0 … ``blocks`` − 1.

    The calls that name a slot are made by the runner's thread alone. Other pools of the budget may take the
    memory of blocks that no slot holds, at any time. Shared blocks are full, so they are never written.

    Args:
        slots: sequences at once.
        context: most tokens of a slot.
        block_bytes: keys and values of one block, in all layers.
        on_release: is called with free blocks whose memory is to be returned to the system, on any thread,
            until ``close``.

    Raises:
        CacheTooSmall
    """

    def __init__(
        self,
        slots: int,
        context: int,
        block_bytes: int,
        budget: KVBudget,
        on_release: Callable[[Sequence[int]], None],
    ) -> None:
        full = -(-context // BLOCK_TOKENS)
        self.budget, self.blocks = budget, slots * full
        if budget.limit is not None:
            self.blocks = min(self.blocks, budget.limit // block_bytes)
        if self.blocks < full:
            raise CacheTooSmall(
                f"{full * block_bytes} bytes of keys and values make a sequence of {context} tokens, but "
                f"KV_CACHE_MEMORY is {budget.limit}; raise it or lower MAX_TOTAL_TOKENS"
            )
        self._slots = [Slot() for _ in range(slots)]
        self._index = PrefixIndex()
        self._blocks = Allocator(self.blocks, block_bytes, budget, self._index, on_release)
        self._queried = self._hits = 0

    def table(self, slot: int) -> Sequence[int]:
        """The slot's blocks in the order of its tokens; valid until the next call."""
        return self._slots[slot].blocks

    def length(self, slot: int) -> int:
        """The slot's tokens."""
        return self._slots[slot].length

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's keys and values."""
        return self._blocks.block_bytes

    @property
    def committed_bytes(self) -> int:
        """Bytes of the blocks in use, cached, or free with memory that was not returned yet."""
        return (self._blocks.held_blocks + self._blocks.unreturned_blocks) * self.block_bytes

    @property
    def capacity(self) -> int:
        """Most tokens of one sequence that has the whole budget."""
        limit = self.budget.limit
        blocks = self.blocks if limit is None else min(self.blocks, limit // self.block_bytes)
        return blocks * BLOCK_TOKENS

    def reserve(self, slot: int, tokens: int) -> bool:
        """Takes the blocks that ``tokens`` more need; False, and none is taken, if there are not enough.

        Where no block is free, cached ones are evicted, least recently used first, also of other pools.
        """
        held = self._slots[slot]
        missing = held.missing(tokens)
        if missing <= 0:
            return True
        with self.budget.lock:
            if missing > self._blocks.available:
                return False
            held.blocks.extend(self._blocks.take() for _ in range(missing))
        return True

    def may_admit(self, tokens: int, known: Sequence[int], owner: str | None, spare: int) -> bool:
        """Whether a new sequence of ``tokens`` gets its blocks by ``attach`` and ``reserve`` now.

        While it is False, the pool waits, and other pools admit no sequence before this one has. Holding the
        budget's lock from this call to ``reserve`` keeps the answer true.

        Args:
            known: the ids that ``attach`` will look for.
            spare: blocks to be left for the sequences that run.
        """
        budget = self.budget
        with budget.lock:
            path = self._index.longest_prefix(known, owner)
            missing = -(-tokens // BLOCK_TOKENS) - len(path) + sum(not node.users for node in path)
            if not budget.is_first(self._blocks) or missing + spare > self._blocks.available:
                budget.wait(self._blocks)
                return False
            budget.stop_waiting(self._blocks)
        return True

    def stop_waiting(self) -> None:
        """Other pools may admit sequences again."""
        self.budget.stop_waiting(self._blocks)

    def attach(self, slot: int, ids: Sequence[int], owner: str | None) -> int:
        """Gives the slot the cached blocks of the longest known prefix of ``ids``; returns its tokens.

        The prefix has whole blocks, and at most ``len(ids) − 1`` tokens: the last one's logits are needed.
        The slot's text is indexed from now on. Blocks that were reserved for the prefix are free again.

        Args:
            owner: finds prefixes of the same owner's texts alone.

        Raises:
            ValueError: tokens were computed in the slot.
        """
        held = self._slots[slot]
        if held.length > held.attached:
            raise ValueError(f"slot {slot} is not empty")
        with self.budget.lock:
            path = self._index.longest_prefix(ids, owner)
            for node in path:
                self._index.use(node)
            self._disuse(held.path)
            reserved = held.blocks[len(held.path) :]
            kept = max(0, len(held.blocks) - len(path))
            held.blocks = [*(node.block for node in path), *reserved[:kept]]
            self._give(reserved[kept:])
        held.path, held.tail = path, []
        held.length = held.attached = len(path) * BLOCK_TOKENS
        held.parent = path[-1] if path else self._index.root(owner)
        held.queried = len(ids)
        return held.length

    def append(self, slot: int, ids: Sequence[int]) -> None:
        """Records tokens that were computed into reserved blocks.

        A block that became full is indexed, if the slot was attached. If another slot computed the same
        text in the meantime, that block replaces the slot's own in its table; they are equal.

        Raises:
            ValueError: the blocks don't hold them.
        """
        held = self._slots[slot]
        if held.length + len(ids) > len(held.blocks) * BLOCK_TOKENS:
            raise ValueError(f"no blocks are reserved for {len(ids)} tokens of slot {slot}")
        if held.queried:
            self._queried += held.queried
            self._hits += held.length
            held.queried = 0
        held.length += len(ids)
        if held.parent is None:
            return
        held.tail.extend(ids)
        while len(held.tail) >= BLOCK_TOKENS:
            self._index_block(held, held.parent)

    def _index_block(self, held: Slot, parent: Node) -> None:
        ids, position = held.tail[:BLOCK_TOKENS], len(held.path)
        with self.budget.lock:
            node = self._index.insert(parent, ids, held.blocks[position])
            self._index.use(node)
            if node.block != held.blocks[position]:
                self._give([held.blocks[position]])
                held.blocks[position] = node.block
        del held.tail[:BLOCK_TOKENS]
        held.path.append(node)
        held.parent = node

    def free(self, slot: int) -> None:
        """Empties the slot. Indexed blocks stay cached, others are free."""
        held = self._slots[slot]
        if held.blocks:
            with self.budget.lock:
                self._disuse(held.path)
                self._give(held.blocks[len(held.path) :])
        self._slots[slot] = Slot()

    def widen(self, block_bytes: int) -> bool:
        """Blocks have ``block_bytes`` from now on; False, and they don't, if the budget has no room for that.

        The contents of the slots' tables remain; cached blocks that no slot uses are forgotten.
        """
        with self.budget.lock:
            return self._blocks.widen(block_bytes)

    def close(self) -> None:
        """Leaves the budget, before the runner drops the memory; any number of calls."""
        with self.budget.lock:
            self._blocks.close()

    def stats(self) -> PoolStats:
        """Thread-safe."""
        with self.budget.lock:
            cached = self._index.idle
            return PoolStats(
                self.blocks,
                self.block_bytes,
                self._blocks.held_blocks - cached,
                cached,
                self._queried,
                self._hits,
                self._blocks.evictions,
            )

    def _give(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._blocks.give(blocks)
            self.budget.version += 1

    def _disuse(self, path: Sequence[Node]) -> None:
        tick = self.budget.tick()
        for node in reversed(path):
            self._index.disuse(node, tick)
        if path and not path[-1].users:
            self.budget.version += 1
