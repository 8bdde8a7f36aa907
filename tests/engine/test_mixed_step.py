"""A prefill chunk and the running rows in one pass, if the runner supports it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.engine.engine import Engine
from tests.engine.test_engine import ids_of, params, with_engine
from tests.fakes import FakeRunner

LONG = list(range(60, 82))


class MixedFake(FakeRunner):
    """Also computes a prefill chunk and running rows in one pass; ``on_advance`` is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.on_advance: Callable[[], None] = lambda: None
        self.advances: list[int] = []

    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        self.on_advance()
        self.advances.append(len(ids))
        last = self.prefill(slot, ids)
        assert last is not None
        return torch.cat([last, self.decode(slots, next_ids)])


def among_running_rows(runner: MixedFake) -> list[list[int]]:
    """Two rows run and a long prompt joins. Returns the tokens of each, the long one's last."""
    found: list[list[int]] = []

    async def check(engine: Engine, _: FakeRunner) -> None:
        running = [engine.generate([70 + i], params(40)) for i in range(2)]
        for one in running:
            await anext(one)
        late = await ids_of(engine.generate(LONG, params(3)))
        found.extend([*[await ids_of(one) for one in running], late])

    with_engine(check, runner=runner, prefill_chunk=64, prefill_chunk_busy=5)
    return found


def test_a_prompt_joins_running_rows_in_the_same_pass() -> None:
    runner = MixedFake()
    runner.delay = 0.002
    found = among_running_rows(runner)
    assert found == [runner.expected([70], 40)[1:], runner.expected([71], 40)[1:], runner.expected(LONG, 3)]
    assert runner.advances[-5:] == [5, 5, 5, 5, 2]


def test_a_failed_mixed_pass_is_repeated_in_parts() -> None:
    def fail() -> None:
        raise RuntimeError("not both at once")

    runner = MixedFake()
    runner.delay, runner.on_advance = 0.002, fail
    found = among_running_rows(runner)
    assert found == [runner.expected([70], 40)[1:], runner.expected([71], 40)[1:], runner.expected(LONG, 3)]
    assert not runner.advances
