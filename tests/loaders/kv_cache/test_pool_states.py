"""Random operations on two pools of one budget, against the memory that they stand for.

A block of that memory holds, for each token, all ids up to it: a wrong prefix, a block that two texts share
or one that is taken while a slot holds it shows as another history than the slot's own.
"""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loaders.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from loaders.kv_cache.budget import KVBudget

SLOTS, BLOCKS = 3, 4  # slots of a pool, blocks of a slot's context
LIMIT = 900
slots = st.tuples(st.sampled_from([0, 1]), st.integers(0, SLOTS - 1))
owners = st.sampled_from([None, "key"])
counts = st.integers(1, 2 * BLOCK_TOKENS)
texts = st.lists(st.integers(0, 1), min_size=BLOCKS, max_size=BLOCKS).map(
    lambda bits: [bit * 1000 + i for bit in bits for i in range(BLOCK_TOKENS)]
)
History = tuple[str | None, tuple[int, ...]]


class Memory:
    """The arena of one pool, with what a real one computes of each token: a function of its whole past."""

    def __init__(self, block_bytes: int, budget: KVBudget) -> None:
        self.blocks: dict[int, dict[int, History]] = {}
        self.pool = BlockPool(SLOTS, BLOCKS * BLOCK_TOKENS, block_bytes, budget, self.release)
        self.ids: list[list[int]] = [[] for _ in range(SLOTS)]
        self.owner: list[str | None] = [None] * SLOTS

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.blocks.pop(block, None)
        held = {block for slot in range(SLOTS) for block in self.pool.table(slot)}
        assert not held & set(blocks)

    def write(self, slot: int, ids: Sequence[int]) -> None:
        table = self.pool.table(slot)
        for position, _ in enumerate(ids, len(self.ids[slot])):
            text = (*self.ids[slot], *ids)[: position + 1]
            block = self.blocks.setdefault(table[position // BLOCK_TOKENS], {})
            block[position % BLOCK_TOKENS] = self.owner[slot], text
        self.ids[slot] += ids

    def check(self) -> None:
        for slot, ids in enumerate(self.ids):
            table = self.pool.table(slot)
            assert self.pool.length(slot) == len(ids) <= len(table) * BLOCK_TOKENS
            for position in range(len(ids)):
                found = self.blocks[table[position // BLOCK_TOKENS]][position % BLOCK_TOKENS]
                assert found == (self.owner[slot], tuple(ids[: position + 1]))


class Pools(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.budget = KVBudget(LIMIT)
        self.memories = [Memory(100, self.budget), Memory(150, self.budget)]

    @rule(where=slots, ids=texts, length=counts, owner=owners)
    def attach(self, where: tuple[int, int], ids: list[int], length: int, owner: str | None) -> None:
        memory, slot = self.memories[where[0]], where[1]
        memory.pool.free(slot)
        memory.ids[slot], memory.owner[slot] = [], owner
        cached = memory.pool.attach(slot, ids[: 2 * length], owner)
        memory.ids[slot] = ids[:cached]
        self.append(where, ids[cached:], length)

    @rule(where=slots, ids=texts, length=counts)
    def append(self, where: tuple[int, int], ids: list[int], length: int) -> None:
        memory, slot = self.memories[where[0]], where[1]
        ids = ids[: min(length, BLOCKS * BLOCK_TOKENS - len(memory.ids[slot]))]
        before = list(memory.pool.table(slot))
        if memory.pool.reserve(slot, len(ids)):
            memory.write(slot, ids)
            memory.pool.append(slot, ids)
        else:
            assert list(memory.pool.table(slot)) == before

    @rule(where=slots)
    def free(self, where: tuple[int, int]) -> None:
        memory, slot = self.memories[where[0]], where[1]
        memory.pool.free(slot)
        memory.ids[slot], memory.owner[slot] = [], None

    @invariant()
    def the_memory_of_every_slot_is_its_own_text(self) -> None:
        for memory in self.memories:
            memory.check()

    @invariant()
    def the_limit_holds_and_every_block_is_counted(self) -> None:
        assert self.budget.used <= self.budget.committed <= LIMIT
        for memory in self.memories:
            stats = memory.pool.stats()
            held = {block for slot in range(SLOTS) for block in memory.pool.table(slot)}
            assert (stats.used, stats.blocks >= stats.used + stats.cached) == (len(held), True)

    def teardown(self) -> None:
        for memory in self.memories:
            for slot in range(SLOTS):
                memory.pool.free(slot)
            assert memory.pool.stats().used == 0


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
