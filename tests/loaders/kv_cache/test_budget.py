"""Several pools of one budget: memory moves between them, and none of them starves."""

from loaders.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from loaders.kv_cache.budget import KVBudget

SMALL, LARGE = 100, 200  # bytes of a block


class Pools:
    """Two pools of four slots; ``released`` has the blocks whose memory the first had to return."""

    def __init__(self, limit: int) -> None:
        self.budget, self.released = KVBudget(limit), list[int]()
        self.one = BlockPool(4, 4 * BLOCK_TOKENS, SMALL, self.budget, self.released.extend)
        self.two = BlockPool(4, 4 * BLOCK_TOKENS, LARGE, self.budget, lambda blocks: None)


def fill(pool: BlockPool, slot: int, blocks: int, first: int = 0) -> None:
    ids = list(range(first, first + blocks * BLOCK_TOKENS))
    pool.attach(slot, ids, None)
    assert pool.reserve(slot, len(ids))
    pool.append(slot, ids)


def test_the_sum_over_all_pools_stays_within_the_limit() -> None:
    pools = Pools(800)
    assert pools.two.reserve(0, 2 * BLOCK_TOKENS)
    assert not pools.one.reserve(0, 5 * BLOCK_TOKENS)
    assert pools.one.reserve(0, 4 * BLOCK_TOKENS)
    assert pools.budget.used == 800
    assert not pools.two.reserve(0, 3 * BLOCK_TOKENS)
    assert not pools.one.reserve(1, 1)


def test_free_blocks_keep_their_memory_until_another_pool_needs_it() -> None:
    pools = Pools(800)
    assert pools.one.reserve(0, 4 * BLOCK_TOKENS)
    table = list(pools.one.table(0))
    pools.one.free(0)
    assert (pools.budget.used, pools.budget.committed, pools.released) == (0, 400, [])
    assert pools.two.reserve(0, 2 * BLOCK_TOKENS)
    assert pools.released == []
    assert pools.two.reserve(0, 3 * BLOCK_TOKENS)
    assert sorted(pools.released) == sorted(table)
    assert pools.budget.committed <= 800


def test_cached_blocks_of_another_pool_are_evicted_least_recently_used_first() -> None:
    pools = Pools(800)
    fill(pools.one, 0, 2)
    pools.one.free(0)
    fill(pools.two, 0, 3)
    pools.two.free(0)
    fill(pools.two, 1, 1, first=1000)
    assert (pools.one.stats().cached, pools.one.stats().evictions) == (0, 2)
    assert (pools.two.stats().cached, pools.two.stats().evictions) == (3, 0)
    assert len(pools.released) == 2


def test_a_pools_own_cached_blocks_go_before_more_recent_ones_of_others() -> None:
    pools = Pools(800)
    fill(pools.two, 0, 3)
    pools.two.free(0)
    fill(pools.one, 0, 2)
    pools.one.free(0)
    fill(pools.two, 1, 1, first=1000)
    assert (pools.one.stats().cached, pools.two.stats().cached) == (2, 2)


def test_blocks_in_use_elsewhere_are_not_taken() -> None:
    pools = Pools(800)
    fill(pools.one, 0, 3)
    pools.one.free(0)
    pools.one.attach(1, list(range(3 * BLOCK_TOKENS)), None)  # two blocks
    assert not pools.two.reserve(0, 4 * BLOCK_TOKENS)
    assert pools.two.reserve(0, 3 * BLOCK_TOKENS)
    assert pools.one.stats().used == 2


def test_a_closed_pool_gives_its_bytes_back() -> None:
    pools = Pools(800)
    fill(pools.one, 0, 4)
    pools.one.close()
    pools.one.close()
    assert pools.budget.used == 0
    assert pools.two.reserve(0, 4 * BLOCK_TOKENS)


def test_a_pool_that_is_dropped_unclosed_gives_its_bytes_back() -> None:
    pools = Pools(800)
    fill(pools.one, 0, 4)
    del pools.one
    assert pools.budget.used == 0


def test_the_pool_that_waits_for_longest_admits_first() -> None:
    pools = Pools(800)
    assert pools.one.reserve(0, 4 * BLOCK_TOKENS)
    assert pools.one.reserve(1, 4 * BLOCK_TOKENS)
    assert not pools.two.may_admit(2 * BLOCK_TOKENS, [], None, 0)
    before = pools.budget.version
    pools.one.free(0)
    pools.one.free(1)
    assert pools.budget.version > before
    assert not pools.one.may_admit(BLOCK_TOKENS, [], None, 0), "the other pool was first"
    assert pools.two.may_admit(2 * BLOCK_TOKENS, [], None, 0)
    assert pools.one.may_admit(BLOCK_TOKENS, [], None, 0)


def test_a_pool_that_no_longer_waits_lets_others_admit() -> None:
    pools = Pools(800)
    assert pools.one.reserve(0, 4 * BLOCK_TOKENS)
    assert not pools.two.may_admit(4 * BLOCK_TOKENS, [], None, 0)
    pools.two.stop_waiting()
    assert pools.one.may_admit(BLOCK_TOKENS, [], None, 0)


def test_admission_leaves_blocks_to_running_sequences_and_counts_known_ones() -> None:
    pools = Pools(800)
    ids = list(range(4 * BLOCK_TOKENS))
    fill(pools.one, 0, 4)
    assert pools.one.may_admit(4 * BLOCK_TOKENS, [], None, 0)
    assert not pools.one.may_admit(4 * BLOCK_TOKENS, [], None, 1)
    assert pools.one.may_admit(4 * BLOCK_TOKENS, ids, None, 3), "three of its blocks are in use already"
    pools.one.free(0)
    assert not pools.one.may_admit(4 * BLOCK_TOKENS, ids, None, 5), "cached ones can't be evicted for it"


def test_wider_blocks_are_charged_or_refused() -> None:
    pools = Pools(800)
    assert pools.one.reserve(0, 3 * BLOCK_TOKENS)
    assert pools.two.reserve(0, BLOCK_TOKENS)
    assert pools.one.widen(LARGE)
    assert pools.budget.used == 800
    assert pools.one.capacity == 4 * BLOCK_TOKENS
    assert not pools.one.widen(LARGE + 1)
    assert (pools.one.block_bytes, pools.budget.used) == (LARGE, 800)


def test_widening_forgets_cached_blocks_that_no_slot_holds() -> None:
    pools = Pools(800)
    fill(pools.one, 0, 2)
    fill(pools.one, 1, 1, first=1000)
    pools.one.free(1)
    assert pools.one.widen(LARGE)
    assert pools.one.attach(1, list(range(1000, 1100)), None) == 0
    assert pools.one.attach(2, list(range(100)), None) == 2 * BLOCK_TOKENS
