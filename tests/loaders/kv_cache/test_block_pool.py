"""The blocks of one pool: tables, prefixes that are shared, and the order in which they are evicted."""

import pytest

from loaders.kv_cache.block_pool import BLOCK_TOKENS, BlockPool, CacheTooSmall
from loaders.kv_cache.budget import KVBudget

BYTES = 100  # of a block


def make_pool(blocks: int = 8, slots: int = 4, context: int = 4 * BLOCK_TOKENS) -> BlockPool:
    return BlockPool(slots, context, BYTES, KVBudget(blocks * BYTES), lambda released: None)


def text(blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + blocks * BLOCK_TOKENS))


def compute(pool: BlockPool, slot: int, ids: list[int], owner: str | None = None) -> int:
    """Attaches, reserves and appends a prompt as a runner would; returns the tokens that were cached."""
    cached = pool.attach(slot, ids, owner)
    assert pool.reserve(slot, len(ids) - cached)
    pool.append(slot, ids[cached:])
    return cached


def test_a_slot_takes_a_block_when_its_tokens_need_one() -> None:
    pool = make_pool()
    assert pool.reserve(0, BLOCK_TOKENS)
    pool.append(0, text(1))
    assert (len(pool.table(0)), pool.length(0)) == (1, BLOCK_TOKENS)
    assert pool.reserve(0, 1)
    assert pool.reserve(0, 1), "what is reserved already is not taken again"
    assert len(pool.table(0)) == 2
    assert pool.stats().used == 2


def test_a_slot_cannot_hold_tokens_that_were_not_reserved() -> None:
    pool = make_pool()
    assert pool.reserve(0, 1)
    with pytest.raises(ValueError, match="no blocks are reserved"):
        pool.append(0, text(2))


def test_nothing_is_taken_if_there_are_not_enough_blocks() -> None:
    pool = make_pool(blocks=4)
    assert pool.reserve(0, 3 * BLOCK_TOKENS)
    assert not pool.reserve(1, 2 * BLOCK_TOKENS)
    assert pool.stats().used == 3
    assert pool.reserve(1, BLOCK_TOKENS)
    pool.free(0)
    assert pool.reserve(1, 2 * BLOCK_TOKENS)


def test_a_pool_that_does_not_hold_one_full_sequence_is_refused() -> None:
    with pytest.raises(CacheTooSmall, match="KV_CACHE_MEMORY is 300; raise it or lower MAX_TOTAL_TOKENS"):
        make_pool(blocks=3)


def test_without_a_limit_every_slot_gets_its_full_context() -> None:
    pool = BlockPool(2, 2 * BLOCK_TOKENS, BYTES, KVBudget(None), lambda released: None)
    assert pool.reserve(0, 2 * BLOCK_TOKENS)
    assert pool.reserve(1, 2 * BLOCK_TOKENS)
    assert sorted([*pool.table(0), *pool.table(1)]) == [0, 1, 2, 3]
    assert not pool.reserve(1, 2 * BLOCK_TOKENS + 1)


def test_a_known_prefix_is_shared_by_whole_blocks_without_its_last_token() -> None:
    pool = make_pool()
    assert compute(pool, 0, text(2)) == 0
    first = list(pool.table(0))
    assert compute(pool, 1, [*text(2), 7]) == 2 * BLOCK_TOKENS
    assert pool.table(1)[:2] == first
    assert compute(pool, 2, text(2)) == BLOCK_TOKENS, "the logits after the last token are still needed"
    assert compute(pool, 3, [*text(1), 9, 9]) == BLOCK_TOKENS
    stats = pool.stats()
    assert (stats.queried_tokens, stats.hit_tokens) == (7 * BLOCK_TOKENS + 3, 4 * BLOCK_TOKENS)


def test_a_block_is_found_by_all_ids_before_it() -> None:
    pool = make_pool()
    compute(pool, 0, text(2))
    other = [9999, *text(2)[1:]]
    assert compute(pool, 1, other) == 0, "its second block's ids are known, after other ones"


def test_a_prefix_stays_cached_after_its_sequence() -> None:
    pool = make_pool()
    compute(pool, 0, [*text(2), 5])
    pool.free(0)
    stats = pool.stats()
    assert (stats.used, stats.cached) == (0, 2)
    assert compute(pool, 1, [*text(2), 6]) == 2 * BLOCK_TOKENS
    assert pool.stats().cached == 0


def test_generated_tokens_are_known_as_well() -> None:
    pool = make_pool()
    compute(pool, 0, text(1)[:-1])
    for id_ in (BLOCK_TOKENS - 1, 70):
        assert pool.reserve(0, 1)
        pool.append(0, [id_])
    assert pool.attach(1, [*text(1), 70, 71], None) == BLOCK_TOKENS


def test_owners_share_nothing() -> None:
    pool = make_pool()
    compute(pool, 0, text(2), "one")
    assert compute(pool, 1, text(2), "other") == 0
    assert compute(pool, 2, text(2), None) == 0
    assert compute(pool, 3, text(2), "one") == BLOCK_TOKENS


def test_a_slot_that_was_not_attached_is_not_indexed() -> None:
    pool = make_pool()
    assert pool.reserve(0, 2 * BLOCK_TOKENS)
    pool.append(0, text(2))
    pool.free(0)
    stats = pool.stats()
    assert (stats.used, stats.cached) == (0, 0)
    assert pool.attach(1, text(2), None) == 0


def test_a_slot_with_tokens_cannot_be_attached() -> None:
    pool = make_pool()
    compute(pool, 0, text(1))
    with pytest.raises(ValueError, match="slot 0 is not empty"):
        pool.attach(0, text(1), None)


def test_blocks_reserved_for_a_prefix_that_has_become_known_are_given_back() -> None:
    pool = make_pool()
    ids = [*text(3), 1]
    for slot in (0, 1):
        assert pool.attach(slot, ids, None) == 0
        assert pool.reserve(slot, len(ids))
    assert pool.stats().used == 8
    pool.append(0, ids)
    assert pool.attach(1, ids, None) == 3 * BLOCK_TOKENS
    assert pool.table(1)[:3] == pool.table(0)[:3]
    assert (len(pool.table(1)), pool.stats().used) == (4, 5)
    pool.append(1, ids[-1:])


def test_equal_blocks_computed_at_the_same_time_become_one() -> None:
    pool = make_pool()
    for slot in (0, 1):
        pool.attach(slot, text(2), None)
        assert pool.reserve(slot, 2 * BLOCK_TOKENS)
    for slot in (0, 1):
        pool.append(slot, text(2))
    assert pool.table(0) == pool.table(1)
    assert pool.stats().used == 2
    pool.free(0)
    assert pool.stats().cached == 0
    pool.free(1)
    assert (pool.stats().used, pool.stats().cached) == (0, 2)


def test_the_least_recently_used_prefix_is_evicted_first_and_its_end_before_its_beginning() -> None:
    pool = make_pool(blocks=6)
    for first in (0, 1000, 2000):
        compute(pool, 0, text(2, first))
        pool.free(0)
    compute(pool, 1, [*text(2), 1][: BLOCK_TOKENS + 1])  # the oldest becomes the most recent
    pool.free(1)
    assert pool.reserve(2, 2 * BLOCK_TOKENS)
    pool.free(2)
    found = [pool.attach(3, [*text(2, first), 1], None) for first in (0, 1000, 2000)]
    assert found == [BLOCK_TOKENS, BLOCK_TOKENS, 2 * BLOCK_TOKENS]
    assert pool.stats().evictions == 2


def test_a_block_in_use_is_not_evicted() -> None:
    pool = make_pool(blocks=4)
    compute(pool, 0, text(2))
    assert not pool.reserve(1, 3 * BLOCK_TOKENS)
    assert pool.attach(1, text(2), None) == BLOCK_TOKENS
    pool.free(0)
    assert pool.reserve(2, 3 * BLOCK_TOKENS), "the second block is idle, the first is attached"
    assert pool.table(1)[0] not in pool.table(2)


def test_freeing_an_empty_slot_does_nothing() -> None:
    pool = make_pool()
    pool.free(0)
    assert pool.stats().used == 0
