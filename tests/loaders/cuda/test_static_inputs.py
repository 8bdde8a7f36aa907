"""Rows that go on from the device by themselves, against the same rows told all they are at every step."""

import random

import pytest
import torch

from loaders.cuda import static_inputs
from loaders.cuda.graph_runner import GraphRunner
from loaders.cuda.step_graphs import Key
from tests import checkpoints
from tests.loaders.cuda.test_graph_runner import specified
from tests.recorded_graphs import RecordedGraphs


class Pair:
    """Two runners of the same sequences: one goes on by itself where it can, one is told all."""

    def __init__(self, seed: int, steady: bool) -> None:
        self.dice = random.Random(seed)
        model = checkpoints.gpt2()
        self.by_itself, self.told = (
            GraphRunner(model, specified(model, steady=steady), RecordedGraphs()) for _ in range(2)
        )
        self.held: dict[int, int] = {}

    def come(self, slot: int, tokens: int) -> None:
        prompt = [self.dice.randrange(300) for _ in range(tokens)]
        for runner in (self.by_itself, self.told):
            runner.prefill(slot, prompt)
        self.held[slot] = tokens

    def go(self, slot: int) -> int:
        """How many tokens it held."""
        for runner in (self.by_itself, self.told):
            runner.free(slot)
        return self.held.pop(slot)

    def change(self) -> None:
        """A row comes, goes, or gives its place to another: as long as it was, or would have been, or not."""
        free = sorted({0, 1, 2, 3} - set(self.held))
        if not self.held or (free and self.dice.random() < 0.3):
            self.come(self.dice.choice(free), self.dice.randint(1, 4))
        elif self.dice.random() < 0.3:
            slot = self.dice.choice(sorted(self.held))
            tokens = self.go(slot)
            if not self.held or self.dice.random() < 0.7:
                self.come(slot, self.dice.choice([tokens, tokens + 1, 2]))

    def step(self) -> None:
        slots = sorted(self.held)
        if self.dice.random() < 0.2:  # some of them, in any order
            slots = self.dice.sample(slots, self.dice.randint(1, len(slots)))
        ids = [self.dice.randrange(300) for _ in slots]
        if self.dice.random() < 0.2:
            self.fail(slots, torch.tensor(ids))
        found = self.by_itself.decode_from(slots, torch.tensor(ids))
        torch.testing.assert_close(found, self.told.decode(slots, ids), atol=0, rtol=0)
        for slot in slots:
            self.held[slot] += 1

    def fail(self, slots: list[int], tokens: torch.Tensor) -> None:
        """A step that breaks before or after it has computed; it is tried again then."""
        run, computes = self.by_itself._run, self.dice.random() < 0.5

        def broken(key: Key) -> None:
            if computes:
                run(key)
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.by_itself, "_run", broken)
            with pytest.raises(torch.OutOfMemoryError):
                self.by_itself.decode_from(slots, tokens)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for everything that is sent to the device."""
    noted, send = list[int](), static_inputs._send

    def noting(rows: list[list[int]], target: torch.Tensor) -> None:
        noted.append(len(rows))
        send(rows, target)

    monkeypatch.setattr(static_inputs, "_send", noting)
    return noted


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_go_on_by_themselves_compute_what_those_do_that_are_told_all(seed: int) -> None:
    pair = Pair(seed, steady=seed % 2 == 0)
    for _ in range(100):
        pair.change()
        pair.step()
    by_itself, told = pair.by_itself._cache, pair.told._cache
    assert by_itself is not None
    assert told is not None
    torch.testing.assert_close(by_itself._all, told._all, atol=0, rtol=0)


def test_nothing_is_sent_to_rows_that_go_on(sent: list[int]) -> None:
    pair = Pair(0, steady=True)
    runner = pair.by_itself
    for slot in (0, 2):
        pair.come(slot, 4)
    runner.decode([0, 2], [5, 6])
    sent.clear()
    for id_ in range(7, 17):
        runner.decode_from([0, 2], torch.tensor([id_, id_]))
    assert not sent
    runner.prefill(1, [9])
    sent.clear()
    runner.decode_from([0, 2], torch.tensor([1, 2]))
    assert not sent, "another's prompt is nothing to these rows"
    runner.decode_from([0, 1, 2], torch.tensor([1, 2, 3]))
    assert len(sent) == 1
    runner.free(2)
    runner.prefill(2, [3] * 5)
    sent.clear()
    runner.decode_from([0, 1, 2], torch.tensor([1, 2, 3]))
    assert len(sent) == 1, "a slot has another guest"


def test_a_step_that_failed_finds_its_places_again() -> None:
    pair = Pair(1, steady=False)
    pair.come(0, 3)
    pair.come(1, 2)
    for runner in (pair.by_itself, pair.told):
        runner.decode([0, 1], [5, 6])
    pair.fail([0, 1], torch.tensor([7, 8]))
    pair.fail([0, 1], torch.tensor([7, 8]))
    found = pair.by_itself.decode_from([0, 1], torch.tensor([7, 8]))
    torch.testing.assert_close(found, pair.told.decode([0, 1], [7, 8]), atol=0, rtol=0)
    found = pair.by_itself.decode([1, 0], [9, 10])
    torch.testing.assert_close(found, pair.told.decode([1, 0], [9, 10]), atol=0, rtol=0)


def test_other_rows_of_the_same_lengths_are_told_where_they_are() -> None:
    pair = Pair(2, steady=False)
    for slot, tokens in ((0, 3), (1, 3), (2, 5), (3, 4)):
        pair.come(slot, tokens)
    for slots in ([0, 1], [1, 0], [0, 1], [3, 0], [2, 1], [2], [0], [0, 1, 2, 3], [0, 1, 2, 3]):
        ids = [10 * slot + 5 for slot in slots]
        found = pair.by_itself.decode_from(slots, torch.tensor(ids))
        torch.testing.assert_close(found, pair.told.decode(slots, ids), atol=0, rtol=0)
