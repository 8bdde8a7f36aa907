"""The budget of a loaded model's cache."""

from dataclasses import replace

import pytest

import loaders
from loaders.base import ModelSpec
from loaders.errors import OutOfMemory
from loaders.kv_cache.budget import KVBudget


def test_a_limit_below_one_sequence_refuses_the_load_with_the_reason(small_spec: ModelSpec) -> None:
    with pytest.raises(OutOfMemory, match=r"KV_CACHE_MEMORY is 1000; raise it or lower MAX_TOTAL_TOKENS"):
        loaders.load("fp32", replace(small_spec, kv_budget=KVBudget(1000)))
