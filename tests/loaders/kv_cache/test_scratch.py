"""Scoring a text takes its memory from the budget that all caches share."""

from dataclasses import replace
from pathlib import Path

import pytest

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.kv_cache.block_pool import BLOCK_TOKENS
from loaders.kv_cache.budget import KVBudget
from loaders.kv_cache.scratch import ScratchBlocks
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from tests import checkpoints


def test_blocks_count_while_they_are_used() -> None:
    budget = KVBudget(100)
    with ScratchBlocks(budget, 3, 30):
        assert budget.used == 90
        with pytest.raises(MemoryError, match="no room for 1 blocks"), ScratchBlocks(budget, 1, 11):
            pass
    assert budget.used == 0


@pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
def test_scoring_evicts_what_is_cached_and_never_what_is_in_use(tmp_path: Path) -> None:
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(checkpoints.llama(), tmp_path))), slots=2)
    text = list(range(10, 10 + 4 * BLOCK_TOKENS))
    plain = loaders.load("fp32", spec).runner
    assert isinstance(plain, DecoderCPURunner)
    full = spec.max_tokens // BLOCK_TOKENS
    budget = KVBudget(full * plain.pool.block_bytes)
    runner = loaders.load("fp32", replace(spec, kv_budget=budget)).runner
    assert isinstance(runner, DecoderCPURunner)
    runner.attach(0, text, None)
    runner.prefill(0, text)
    assert runner.score(text).equal(plain.score(text))  # four blocks of eight are left
    with pytest.raises(MemoryError, match="text to score"):
        runner.score_together([text, text], 1)
    runner.free(0)
    assert runner.score_together([text, text], 1).equal(plain.score_together([text, text], 1))
    assert budget.used == 0
