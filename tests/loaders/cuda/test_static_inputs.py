"""Rows that continue from tokens on the device, against the same rows sent in full at every step."""

import random

import pytest
import torch

from loaders.cuda.graph_runner import GraphRunner
from loaders.cuda.pinned import send_into
from loaders.cuda.step_graphs import Key
from tests import checkpoints
from tests.loaders.cuda.test_graph_runner import specified
from tests.recorded_graphs import RecordedGraphs


class Pair:
    """Two runners of the same sequences: one continues on the device if it can, one is sent every input."""

    def __init__(self, seed: int, steady: bool) -> None:
        self.dice = random.Random(seed)
        model = checkpoints.gpt2()
        self.continuing, self.full = (
            GraphRunner(model, specified(model, steady=steady), RecordedGraphs()) for _ in range(2)
        )
        self.held: dict[int, int] = {}

    def come(self, slot: int, tokens: int) -> None:
        prompt = [self.dice.randrange(300) for _ in range(tokens)]
        for runner in (self.continuing, self.full):
            runner.prefill(slot, prompt)
        self.held[slot] = tokens

    def go(self, slot: int) -> int:
        """Returns how many tokens the slot held."""
        for runner in (self.continuing, self.full):
            runner.free(slot)
        return self.held.pop(slot)

    def change(self) -> None:
        """A row joins, leaves, or is replaced: at its length, at its next length, or at another."""
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
        found = self.continuing.decode_from(slots, torch.tensor(ids))
        torch.testing.assert_close(found, self.full.decode(slots, ids), atol=0, rtol=0)
        for slot in slots:
            self.held[slot] += 1

    def fail(self, slots: list[int], tokens: torch.Tensor) -> None:
        """A step that fails before or after it has computed, and is retried."""
        run, computes = self.continuing._run, self.dice.random() < 0.5

        def broken(key: Key) -> None:
            if computes:
                run(key)
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.continuing, "_run", broken)
            with pytest.raises(torch.OutOfMemoryError):
                self.continuing.decode_from(slots, tokens)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per transfer to the device."""
    noted = list[int]()

    def noting(target: torch.Tensor, rows: list[list[int]]) -> None:
        noted.append(len(rows))
        send_into(target, rows)

    monkeypatch.setattr("loaders.cuda.static_inputs.send_into", noting)
    return noted


@pytest.mark.parametrize("seed", range(8))
def test_continuing_rows_compute_the_same_as_rows_sent_in_full(seed: int) -> None:
    pair = Pair(seed, steady=seed % 2 == 0)
    for _ in range(100):
        pair.change()
        pair.step()
    continuing, full = pair.continuing._cache, pair.full._cache
    assert continuing is not None
    assert full is not None
    torch.testing.assert_close(continuing._all, full._all, atol=0, rtol=0)


def test_nothing_is_sent_for_continuing_rows(sent: list[int]) -> None:
    pair = Pair(0, steady=True)
    runner = pair.continuing
    for slot in (0, 2):
        pair.come(slot, 4)
    runner.decode([0, 2], [5, 6])
    assert sent
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


def test_a_failed_step_restores_its_positions() -> None:
    pair = Pair(1, steady=False)
    pair.come(0, 3)
    pair.come(1, 2)
    for runner in (pair.continuing, pair.full):
        runner.decode([0, 1], [5, 6])
    pair.fail([0, 1], torch.tensor([7, 8]))
    pair.fail([0, 1], torch.tensor([7, 8]))
    found = pair.continuing.decode_from([0, 1], torch.tensor([7, 8]))
    torch.testing.assert_close(found, pair.full.decode([0, 1], [7, 8]), atol=0, rtol=0)
    found = pair.continuing.decode([1, 0], [9, 10])
    torch.testing.assert_close(found, pair.full.decode([1, 0], [9, 10]), atol=0, rtol=0)


def test_other_rows_of_the_same_lengths_are_sent_in_full() -> None:
    pair = Pair(2, steady=False)
    for slot, tokens in ((0, 3), (1, 3), (2, 5), (3, 4)):
        pair.come(slot, tokens)
    for slots in ([0, 1], [1, 0], [0, 1], [3, 0], [2, 1], [2], [0], [0, 1, 2, 3], [0, 1, 2, 3]):
        ids = [10 * slot + 5 for slot in slots]
        found = pair.continuing.decode_from(slots, torch.tensor(ids))
        torch.testing.assert_close(found, pair.full.decode(slots, ids), atol=0, rtol=0)
