"""Prompts with the same beginning go to the same replica, unless it is much busier than another."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitdial[ray]'")
from server.ray.affinity import ranked

NAMES = [f"replica-{number}" for number in range(4)]
BEGINNINGS = [f"You are assistant number {number}." for number in range(2000)]


def first(beginning: str, names: list[str] = NAMES, lengths: Mapping[str, int] = MappingProxyType({})) -> str:
    return ranked(beginning, {name: lengths.get(name, 0) for name in names}, slack=2)[0]


def test_beginnings_are_spread_evenly_and_stay() -> None:
    counts = Counter(first(beginning) for beginning in BEGINNINGS)
    assert set(counts) == set(NAMES)
    assert min(counts.values()) > 400  # of 500 expected
    assert all(first(one) == first(one, NAMES[::-1]) for one in BEGINNINGS[:50])


def test_the_end_of_a_replica_moves_only_its_own() -> None:
    left = NAMES[:-1]
    moved = [one for one in BEGINNINGS if first(one) != first(one, left)]
    assert moved == [one for one in BEGINNINGS if first(one) == NAMES[-1]]


def test_a_busy_replica_passes_its_beginnings_on_always_to_the_same() -> None:
    beginning = BEGINNINGS[0]
    favourite, second, *_ = ranked(beginning, dict.fromkeys(NAMES, 0), slack=2)
    assert first(beginning, lengths={favourite: 2}) == favourite
    assert first(beginning, lengths={favourite: 3}) == second
    assert ranked(beginning, {**dict.fromkeys(NAMES, 5), favourite: 7}, slack=2)[0] == favourite
