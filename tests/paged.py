"""A model without weights whose slots take blocks of a real pool, and whose memory is those blocks."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loaders.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from loaders.kv_cache.budget import KVBudget
from loaders.runner import Logits
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams, Token
from server.engine.token_stream import TokenStream
from tests.conftest import until
from tests.fakes import FakeRunner, fake_model

BLOCK_BYTES = 64
LONG = [60 + i % 30 for i in range(5 * BLOCK_TOKENS)]


class FakePagedRunner(FakeRunner):
    """Predicts from the ids that it reads back from the blocks of a slot's table.

    So a wrong prefix, a lost token, and a block that is released or given to another slot while it is in use
    change its tokens. Implements ``PagedRunner`` and ``MixedRunner``.

    Args:
        budget: the memory of all pools; unlimited if None.
    """

    def __init__(self, slots: int = 4, context: int = 256, budget: KVBudget | None = None) -> None:
        super().__init__(slots, context)
        self._memory: dict[int, list[int]] = {}
        self.computed = 0
        """Tokens that were computed."""
        self.prefilled: list[int] = []
        """Tokens of each prompt chunk."""
        self.pool = BlockPool(slots, context, BLOCK_BYTES, budget or KVBudget(None), self._release)

    def attach(self, slot: int, ids: Sequence[int], owner: str | None) -> int:
        return self.pool.attach(slot, ids, owner)

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        self._called()
        self.on_prefill(slot, ids)
        self.prefilled.append(len(ids))
        self._write(slot, ids)
        now = self._read(slot)
        ends = range(len(now) - len(ids) + 1, len(now) + 1) if logits == "all" else [len(now)]
        return None if logits == "none" else torch.stack([self._logits(now[:end]) for end in ends])

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self._called()
        self.on_decode(slots)
        self.batches.append(len(slots))
        for slot, id_ in zip(slots, ids, strict=True):
            self._write(slot, [id_])
        return torch.stack([self._logits(self._read(slot)) for slot in slots])

    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        logits = self.prefill(slot, ids)
        assert logits is not None
        return torch.cat([logits, self.decode(slots, next_ids)])

    def free(self, slot: int) -> None:
        self.pool.free(slot)

    def close(self) -> None:
        self.pool.close()
        super().close()

    @property
    def kv_cache_bytes(self) -> int:
        return self.pool.committed_bytes

    def _write(self, slot: int, ids: Sequence[int]) -> None:
        if not self.pool.reserve(slot, len(ids)):
            raise MemoryError
        table, start = self.pool.table(slot), self.pool.length(slot)
        assert start + len(ids) <= self.context, "more tokens than the slot holds"
        others = {block for other in range(self.slots) if other != slot for block in self.pool.table(other)}
        for position, id_ in enumerate(ids, start):
            block, offset = table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
            assert block not in others, "a shared block is written"
            held = self._memory.setdefault(block, [])
            self._memory[block] = [*held[:offset], id_]
            assert len(self._memory[block]) == offset + 1, "a token is missing"
        self.computed += len(ids)
        self.pool.append(slot, ids)

    def _read(self, slot: int) -> list[int]:
        ids = [id_ for block in self.pool.table(slot) for id_ in self._memory.get(block, [])]
        return ids[: self.pool.length(slot)]

    def _release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._memory.pop(block, None)


def paged(blocks: int | None = None, slots: int = 16, context: int = 256) -> FakePagedRunner:
    return FakePagedRunner(slots, context, KVBudget(None if blocks is None else blocks * BLOCK_BYTES))


def with_engines(test: Callable[..., Awaitable[None]], *runners: FakePagedRunner, **options: Any) -> None:
    """Runs the test with an engine for each runner; afterwards no sequence may hold a block."""

    async def main() -> None:
        engines = [Engine(fake_model(runner=runner), eos_ids=frozenset({0}), **options) for runner in runners]
        for engine in engines:
            await engine.start()
        try:
            await test(*engines)
            await until(lambda: not any(engine.running + engine.waiting for engine in engines))
            await until(lambda: not any(runner.pool.stats().used for runner in runners))
        finally:
            for engine in engines:
                await engine.stop()
        assert all(runner.closed and not runner.pool.budget.used for runner in runners)

    asyncio.run(main())


def params(count: int = 8, **others: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **others)


async def tokens_of(stream: TokenStream) -> list[Token]:
    return [token async for token in stream]


async def ids_of(stream: TokenStream) -> list[int]:
    return [token.id for token in await tokens_of(stream)]
