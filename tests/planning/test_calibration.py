"""Step times measured through an engine whose passes take known times, and kept."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loaders.runner import Logits
from server.engine.worker import Worker
from server.errors import Invalid
from server.planning import calibration as module
from server.planning.calibration import Calibration, Calibrator
from server.planning.store import Store
from server.planning.workload import Frontend, Replica
from server.report.subject import Subject
from tests.fakes import FakeRunner, fake_model

_BASE, _ROW, _TOKEN = 0.002, 0.0005, 0.0002
SUBJECT = Subject({"name": "x"}, {"cpu": "y"}, {"bitdial": "1"}, {})


class MixedFake(FakeRunner):
    """Computes a chunk and rows together, in known times of its own clock."""

    now = 0.0

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        self.now += _BASE + _TOKEN * len(ids)
        return super().prefill(slot, ids, logits)

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self.now += _BASE + _ROW * len(slots)
        return super().decode(slots, ids)


class Together(MixedFake):
    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        first = FakeRunner.prefill(self, slot, ids)
        self.now += _TOKEN * len(ids)
        assert first is not None
        return torch.cat([first, self.decode(slots, next_ids)])


def measured(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch, busy_chunk: int = 16, passes: int = 12
) -> Calibration:
    monkeypatch.setattr(module, "ROWS", (1, 4))
    monkeypatch.setattr(module, "CHUNKS", (16, 64))

    async def run() -> Calibration:
        calibrator = Calibrator(fake_model(runner=runner), 1, chunk=64, busy_chunk=busy_chunk, passes=passes)
        return await calibrator.measure(lambda *_: None)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", [MixedFake, Together])
def test_passes_of_every_size_are_measured(kind: type[MixedFake], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = kind(slots=5, context=256)
    monkeypatch.setattr("server.engine.engine.Worker", partial(Worker, clock=lambda: runner.now))
    found = measured(runner, monkeypatch)
    assert found.mixed == (kind is Together)
    times = found.step_times()
    for rows, chunk in [(1, 0), (4, 0), (0, 16), (0, 64), *([(1, 16), (4, 16)] if found.mixed else [])]:
        expected = _BASE + _ROW * rows + _TOKEN * chunk
        assert times.seconds(rows, chunk, 0) == pytest.approx(expected, rel=0.01)


def test_something_else_is_measured_between_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", (1, 4))
    monkeypatch.setattr(module, "CHUNKS", (16, 64))
    runner, at = Together(slots=5, context=256), list[float]()

    async def run() -> int:
        calibrator = Calibrator(fake_model(runner=runner), 1, chunk=64, busy_chunk=16, passes=60)

        async def between() -> None:
            at.append(runner.now)

        found = await calibrator.measure(lambda *_: None, between)
        return min(len(cell.seconds) for cell in found.cells)

    fewest = asyncio.run(run())
    assert fewest >= 30
    assert len(at) == 3
    assert max(at[1] - at[0], at[2] - at[1]) < 2 * at[0]  # about as much is measured before each
    assert at[0] < 2 * min(at[1] - at[0], at[2] - at[1])


class Disturbed(MixedFake):
    """Something else uses the host while its passes 60 to 100 run: two sizes of the first round."""

    passes = 0

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self.passes += 1
        self.now += 0.01 if 60 <= self.passes < 100 else 0.0
        return super().decode(slots, ids)


def test_what_disturbs_the_host_for_a_while_does_not_change_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Disturbed(slots=5, context=256)
    monkeypatch.setattr("server.engine.engine.Worker", partial(Worker, clock=lambda: runner.now))
    times = measured(runner, monkeypatch, passes=60).step_times()
    assert times.seconds(4, 0, 0) == pytest.approx(_BASE + 4 * _ROW, rel=0.02)
    assert times.seconds(1, 0, 0) == pytest.approx(_BASE + _ROW, rel=0.02)
    assert times.disturbance > 2  # it is in the noise


@pytest.mark.parametrize(("busy_chunk", "context"), [(1, 64), (1, 700), (3, 700)])
def test_rows_that_could_never_decode_together_are_not_waited_for(
    busy_chunk: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a chunk of one token the first of four sequences ends before the last has read its prompt."""
    found = measured(Together(slots=5, context=context), monkeypatch, busy_chunk)
    assert {cell.rows for cell in found.cells} == ({0, 1} if context == 64 else {0, 1, 4})


@pytest.mark.parametrize("busy", [16, 128])
def test_chunks_longer_than_the_context_are_left_out(busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", (1,))

    async def run() -> Calibration:
        model = fake_model(runner=Together(slots=2, context=100))
        return await Calibrator(model, 1, chunk=128, busy_chunk=busy, passes=4).measure(lambda *_: None)

    found = asyncio.run(run())
    chunks = {cell.chunk for cell in found.cells if not cell.rows}
    assert chunks == {16, 32, 64}
    assert found.busy_chunk == min(busy, 99)


def test_a_context_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Invalid, match="too short"):
        measured(FakeRunner(slots=5, context=32), monkeypatch)


def test_what_was_measured_is_read_again_unless_it_is_to_be_fresh(cache: Path) -> None:
    from tests.planning.measured import calibration

    store, replica = Store(SUBJECT, Replica(1)), Replica(1)
    assert store.calibration("fp32") is None
    store.keep(calibration())
    store.keep_frontend(Frontend(0.1, 0.2, 0.3))
    again = Store(SUBJECT, replica)
    found = again.calibration("fp32")
    assert found is not None
    assert found.step_times().seconds(3, 7, 0) == calibration().step_times().seconds(3, 7, 0)
    assert again.frontend() == Frontend(0.1, 0.2, 0.3)
    assert Store(SUBJECT, replica, fresh=True).calibration("fp32") is None
    assert Store(SUBJECT, replace(replica, busy_chunk=8)).calibration("fp32") is None
    assert Store(replace(SUBJECT, versions={}), replica).calibration("fp32") is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 0}'])
def test_a_broken_file_is_measured_again(text: str, cache: Path) -> None:
    from tests.planning.measured import calibration

    store = Store(SUBJECT, Replica(1))
    store.keep(calibration())
    (store.folder / "fp32.json").write_text(text)
    assert store.calibration("fp32") is None
