"""Step times of a made-up replica: 4 ms and 1 ms a row, 0.5 ms a prompt token; no noise unless given."""

from collections.abc import Awaitable, Callable, Sequence

import pytest

from server.planning import formulas, planner
from server.planning.calibration import Calibration, Calibrator
from server.planning.step_times import ROUNDS, Cell, StepTimes

ROWS, CHUNKS, BUSY = (1, 2, 4, 8, 16), (16, 32, 64, 128), 16


def pass_seconds(rows: int, chunk: int) -> float:
    return 0.004 + 0.001 * rows + 0.0005 * chunk


def cells(noise: Sequence[float] = (1.0,), mixed: bool = True) -> list[Cell]:
    sizes = [(0, chunk) for chunk in CHUNKS] + [(rows, 0) for rows in ROWS]
    if mixed:
        sizes += [(rows, BUSY) for rows in ROWS]
    return [
        Cell(rows, chunk, [0.0] * len(noise), [pass_seconds(rows, chunk) * one for one in noise])
        for rows, chunk in sizes
    ]


def step_times(noise: Sequence[float] = (1.0,), mixed: bool = True) -> StepTimes:
    return StepTimes(cells(noise, mixed), mixed)


def calibration(precision: str = "fp32", noise: Sequence[float] = (1.0,)) -> Calibration:
    return Calibration(precision, 10_000_000, 1000.0, 0.5, True, BUSY, cells(noise))


def instead_of_measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """These step times, of models that are really loaded. Returns a list that gets their precisions."""
    names: list[str] = []
    monkeypatch.setattr(planner, "_MOST", 300)
    monkeypatch.setattr(planner, "_HALVINGS", 6)
    monkeypatch.setattr(formulas, "_DRAWS", 2000)

    async def measure(
        self: Calibrator, progress: object, between: Callable[[], Awaitable[None]] | None = None
    ) -> Calibration:
        model = self._model
        names.append(model.precision)
        for _ in range(ROUNDS if between else 0):
            assert between is not None
            await between()
        model.close()
        return calibration(model.precision)

    monkeypatch.setattr(Calibrator, "measure", measure)
    return names
