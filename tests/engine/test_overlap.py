"""Overlap: a step is launched before the last one's tokens are read, with the same generated tokens."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from loaders.runner import DeviceRunner
from server.engine.faults import DeviceLost
from server.engine.sampler import PendingTokens, Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Token
from server.engine.sequence import Sequence as Row
from server.engine.worker import Worker
from server.errors import DeadlinePassed, GenerationFailed, ServiceError
from tests.fakes import FakeDeviceRunner, FakeRunner

END = 70
"""A token that the fake model generates sometimes."""


@dataclass
class Order:
    """A test's request: its parameters, when it arrives, and when its client disconnects."""

    prompt: list[int]
    params: SamplingParams
    joins: int = 0
    leaves: int | None = None
    deadline: float | None = None


@dataclass
class Received:
    """The events that a request's reader received."""

    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    error: type[ServiceError] | None = None
    over: bool = False


def order(prompt: Sequence[int] = (5, 6), joins: int = 0, leaves: int | None = None, **params: Any) -> Order:
    deadline = params.pop("deadline", None)
    return Order(list(prompt), SamplingParams(**{"max_new_tokens": 12, **params}), joins, leaves, deadline)


class House:
    """A worker that the test steps; a step is a second."""

    def __init__(self, runner: FakeRunner, chunk: int = 8) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.slots, chunk, on_free=runner.free)
        self.sampler = Sampler(frozenset({END}))
        self.worker = Worker(runner, self.scheduler, self.sampler)

    def serve(self, orders: Sequence[Order]) -> list[Received]:
        rows = [Row(one.prompt, one.params, one.deadline) for one in orders]
        received = {row: Received() for row in rows}
        for now in range(400):
            for row, one in zip(rows, orders, strict=True):
                if one.joins == now:
                    self.scheduler.add(row)
                if one.leaves is not None and len(row.generated) >= one.leaves:
                    row.cancelled = True
            for row, item in self.worker.step(float(now)).events:
                self._note(received[row], item)
            if not self.scheduler.has_work and now > max(one.joins for one in orders):
                break
        assert not self.runner.held, "a slot still holds what is over"
        assert (self.scheduler.running, self.scheduler.waiting) == (0, 0)
        return list(received.values())

    def _note(self, received: Received, item: Token | ServiceError | None) -> None:
        assert not received.over, "an event after the end"
        if isinstance(item, Token):
            received.ids.append(item.id)
            received.finish, received.over = item.finish, item.finish is not None
        else:
            received.error, received.over = type(item) if item is not None else None, True


def both(orders: Sequence[Order], prepare: Callable[[FakeRunner], None] = lambda _: None) -> list[Received]:
    """The events with overlap, asserted equal to those without it."""
    plain, ahead = FakeRunner(), FakeDeviceRunner()
    assert isinstance(ahead, DeviceRunner)
    assert not isinstance(plain, DeviceRunner)
    for runner in (plain, ahead):
        runner.poison = sloped
        prepare(runner)
    expected, found = House(plain).serve(orders), House(ahead).serve(orders)
    assert found == expected
    return found


def sloped(logits: torch.Tensor, _: Sequence[int]) -> torch.Tensor:
    """Distinct logits: of equal ones, samplers may keep different ones."""
    return logits + torch.linspace(0, 0.5, logits.shape[1])


def looked_ahead(orders: Sequence[Order]) -> int:
    runner = FakeDeviceRunner()
    House(runner).serve(orders)
    return runner.ahead


def test_steps_overlap() -> None:
    """Ten of eleven steps of a single row start from a token that the host has not read."""
    assert looked_ahead([order(ignore_eos=True)]) == 10


def test_the_next_step_is_launched_before_the_last_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, happened = FakeDeviceRunner(), list[str]()
    runner.on_decode = lambda _: happened.append("launched")
    house = House(runner)
    launch = house.sampler.launch

    def watched(*arguments: Any) -> PendingTokens:
        picks = launch(*arguments)
        wait = picks.wait

        def read() -> list[Token | Exception]:
            happened.append("read")
            return wait()

        picks.wait = read
        return picks

    monkeypatch.setattr(house.sampler, "launch", watched)
    house.serve([order(max_new_tokens=5)])
    assert happened == ["launched", "launched", "read", "launched", "read", "launched", "read", "read"]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"do_sample": True, "seed": 3},
        {"do_sample": True, "seed": 4, "temperature": 5.0, "top_p": 0.9, "ignore_eos": True},
        {"do_sample": True, "seed": 5, "temperature": 3.0, "top_k": 30, "typical_p": 0.9, "min_p": 1e-4},
        {"logit_bias": ((90, 20.0),)},
        {"repetition_penalty": 1.5},
        {"do_sample": True, "seed": 6, "temperature": 2.0, "frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"logprobs": True, "top_n": 3},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 0},
        {"ignore_eos": True, "max_new_tokens": 60},
    ],
    ids=str,
)
def test_tokens_are_the_same_alone_and_in_a_batch(params: dict[str, Any]) -> None:
    others = [order([9, 10, 11], ignore_eos=True), order([7] * 20, do_sample=True, seed=1)]
    (alone,) = both([order(**params)])
    assert both([order(**params), *others])[0] == alone


def test_rows_that_end_by_the_end_token() -> None:
    """The next token was launched already: it is discarded and never delivered."""
    orders = [order([start], max_new_tokens=100) for start in range(5, 25)]
    received = both(orders)
    ended = [one for one in received if one.finish == "eos_token"]
    assert len(ended) > 10
    assert all(one.ids[-1] == END and END not in one.ids[:-1] for one in ended)
    assert all(len(one.ids) == 100 and END not in one.ids for one in received if one not in ended)


def test_a_row_with_penalties_joins_and_leaves() -> None:
    late = order([8, 8], joins=4, max_new_tokens=5, repetition_penalty=1.3)
    received = both([order([5], ignore_eos=True, max_new_tokens=30), late])
    assert len(received[0].ids) == 30


def test_clients_that_disconnect_during_generation() -> None:
    orders = [order([start, 4], ignore_eos=True, max_new_tokens=50) for start in range(5, 15)]
    whole = both(orders)
    for leaves in range(6):
        gone = [order(o.prompt, leaves=leaves, ignore_eos=True, max_new_tokens=50) for o in orders[::2]]
        found = House(FakeDeviceRunner()).serve([*orders[1::2], *gone])
        assert found[:5] == whole[1::2]
        for one, full in zip(found[5:], whole[::2], strict=True):
            assert one.ids == full.ids[: len(one.ids)]
            assert len(one.ids) < 50


def test_a_deadline_during_generation() -> None:
    """The token in flight is not awaited: one fewer than without overlap."""
    orders = [order([5], deadline=9.0, max_new_tokens=100, ignore_eos=True), order([6], ignore_eos=True)]
    (late, whole), (received, other) = (
        House(made).serve(orders) for made in (FakeRunner(), FakeDeviceRunner())
    )
    assert late.error is received.error is DeadlinePassed
    assert received.ids == late.ids[:-1]
    assert other == whole


def out_of_memory(runner: FakeRunner, bad: int, after: int) -> None:
    """A row that begins with this breaks every step that it is in, once it has some tokens."""

    def fail(slots: Sequence[int]) -> None:
        for slot in slots:
            if runner.held[slot][0] == bad and len(runner.held[slot]) > after:
                raise torch.OutOfMemoryError("CUDA out of memory")

    runner.on_decode = fail


@pytest.mark.parametrize("after", [1, 2, 3, 7])
def test_a_row_that_breaks_the_step(after: int) -> None:
    orders = [order([start], ignore_eos=True) for start in (5, 6, 99, 7)]
    received = both(orders, partial(out_of_memory, bad=99, after=after))
    assert [one.error for one in received] == [None, None, GenerationFailed, None]
    assert [len(one.ids) for one in received] == [12, 12, after + 1, 12]


def test_all_rows_broken_at_once() -> None:
    def fail(runner: FakeRunner) -> None:
        def raised(slots: Sequence[int]) -> None:
            if any(len(runner.held[slot]) > 6 for slot in slots):
                raise RuntimeError("broken")

        runner.on_decode = raised

    received = both([order([start], ignore_eos=True) for start in (5, 6, 7)], fail)
    assert {one.error for one in received} == {GenerationFailed}


@pytest.mark.parametrize("at", [2, 3, 6])
def test_a_row_with_nan_logits(at: int) -> None:
    def poison(runner: FakeRunner) -> None:
        def broken(logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
            logits = sloped(logits, slots)
            for row, slot in enumerate(slots):
                if runner.held[slot][0] == 99 and len(runner.held[slot]) == at:
                    logits[row] = float("nan")
            return logits

        runner.poison = broken

    received = both([order([start], ignore_eos=True) for start in (5, 99, 7)], poison)
    assert [one.error for one in received] == [None, GenerationFailed, None]
    assert len(received[1].ids) == at - 1


def test_a_slot_does_not_affect_its_next_sequence() -> None:
    """One slot: each row leaves while a step with it is in flight; the next one takes the slot at once."""
    orders = [
        order([start, start], ignore_eos=start % 2 == 0, do_sample=start % 3 == 0, seed=start, leaves=leaves)
        for start, leaves in zip(range(5, 25), [None, 1, 2, 3, None] * 4, strict=True)
    ]
    found = House(FakeDeviceRunner(slots=1)).serve(orders)
    for one, asked in zip(found, orders, strict=True):
        alone = House(FakeRunner(slots=1)).serve([Order(asked.prompt, asked.params)])[0]
        assert one.ids == alone.ids[: len(one.ids)]
        assert asked.leaves is not None or one == alone


def test_no_state_is_kept_for_finished_sequences() -> None:
    house = House(FakeDeviceRunner())
    house.serve([order([5], max_new_tokens=100)])
    overlap = house.worker._executor._overlap
    assert overlap is not None
    assert overlap._pending is None


@pytest.mark.parametrize("seed", range(25))
def test_any_mixture(seed: int) -> None:
    """Arrivals, lengths, parameters, faults by chance; more requests than slots."""
    dice = random.Random(seed)
    orders = []
    for number in range(14):
        sampling: dict[str, Any] = {
            "do_sample": True,
            "seed": number,
            "temperature": dice.choice([0.5, 2.0, 6.0]),
        }
        extra: dict[str, Any] = dice.choice(
            [{}, sampling, sampling | {"top_p": 0.9}, sampling | {"top_k": 5}, {"ignore_eos": True}]
            + ([{"repetition_penalty": 1.4}, sampling | {"frequency_penalty": 0.7}] if seed % 2 else [])
        )
        prompt = [dice.randrange(5, 60) for _ in range(dice.randint(1, 20))]
        orders.append(order(prompt, dice.randint(0, 40), max_new_tokens=dice.randint(1, 30), **extra))
    broken = orders[dice.randrange(14)]
    broken.prompt[0] = 99
    for one, expected in zip(both(orders, partial(out_of_memory, bad=99, after=9)), orders, strict=True):
        assert one.over
        assert len(one.ids) <= expected.params.max_new_tokens


def test_a_device_that_fails_every_call_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal memory access no request can be served; the running one did not cause it."""

    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("server.engine.faults.release_unused", refuse)
    house = House(FakeDeviceRunner())

    def fail(_: Sequence[int]) -> None:
        refuse()

    house.runner.on_decode = fail
    with pytest.raises(DeviceLost):
        house.serve([order()])
