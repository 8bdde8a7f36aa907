"""A plan's passes: their order, rows that must be computed again first, prompts without tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loaders.runner import LengthRunner
from server.errors import GenerationFailed
from tests.engine.test_mixed_step import MixedFake
from tests.engine.test_overlap import House, order
from tests.fakes import FakeRunner


class LengthFake(FakeRunner):
    """``behind``: tokens of each slot that must be computed again before it can be decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.behind: dict[int, int] = {}
        self.calls: list[tuple[int, int]] = []

    def expect(self, slot: int, tokens: int) -> None:
        self.behind[slot] = 0

    def catch_up(self, slot: int, tokens: int) -> bool:
        self.calls.append((slot, tokens))
        if self.behind[slot] < 0:
            raise MemoryError
        ready = self.behind[slot] == 0
        self.behind[slot] = max(self.behind[slot] - tokens, 0)
        return ready


def test_only_the_first_row_that_is_behind_catches_up_in_a_step() -> None:
    runner = LengthFake()
    assert isinstance(runner, LengthRunner)

    def prefilled(slot: int, ids: Sequence[int]) -> None:
        runner.behind |= {0: 12, 1: 8} if slot == 2 else {}

    runner.on_prefill = prefilled
    told = House(runner, chunk=8).serve(
        [order([start], max_new_tokens=2, ignore_eos=True) for start in (5, 6, 7)]
    )
    assert [one.ids for one in told] == [runner.expected([start], 2) for start in (5, 6, 7)]
    first, second, third, fourth = [(0, 8), (1, 0), (2, 0)], [(0, 8), (1, 0)], [(0, 8), (1, 8)], [(1, 8)]
    assert runner.calls == [*first, *second, *third, *fourth]
    assert runner.batches == [1, 1, 1]


def test_a_row_that_cannot_catch_up_fails_alone() -> None:
    runner = LengthFake()

    def prefilled(slot: int, ids: Sequence[int]) -> None:
        runner.behind |= {1: -1} if slot == 2 else {}

    runner.on_prefill = prefilled
    told = House(runner).serve([order([start], max_new_tokens=3, ignore_eos=True) for start in (5, 6, 7)])
    assert [one.error for one in told] == [None, GenerationFailed, None]
    assert [len(one.ids) for one in told] == [3, 1, 3]


def test_a_prompt_without_tokens_ends_in_the_pass_of_running_rows() -> None:
    runner = MixedFake()
    running, scored = (
        order([70], max_new_tokens=6, ignore_eos=True),
        order([5, 6, 7], joins=2, max_new_tokens=0),
    )
    told = House(runner).serve([running, scored])
    assert runner.advances == [3]
    assert told[0].ids == runner.expected([70], 6)
    assert (told[1].ids, told[1].error, told[1].over) == ([], None, True)


def test_logits_are_sampled_before_the_next_pass_replaces_them() -> None:
    """They are valid until the runner's next call."""

    class Reusing(FakeRunner):
        def __init__(self) -> None:
            super().__init__()
            self._static = torch.zeros(self.slots, self.vocabulary)

        def _kept(self, logits: Tensor) -> Tensor:
            self._static.fill_(float("nan"))
            return self._static[: len(logits)].copy_(logits)

        def prefill(self, *arguments: object, **options: object) -> Tensor | None:
            logits = super().prefill(*arguments, **options)  # type: ignore[arg-type]
            return None if logits is None else self._kept(logits)

        def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
            return self._kept(super().decode(slots, ids))

    runner = Reusing()
    prompts, joins = ([5], [6, 6], [7, 7, 7], [8]), (0, 0, 2, 2)
    orders = [
        order(prompt, joins=at, max_new_tokens=5, ignore_eos=True)
        for prompt, at in zip(prompts, joins, strict=True)
    ]
    assert [one.ids for one in House(runner).serve(orders)] == [runner.expected(ids, 5) for ids in prompts]
