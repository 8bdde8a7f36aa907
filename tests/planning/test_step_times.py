import numpy as np
import pytest

from server.planning.step_times import Cell, Noise, StepTimes
from tests.planning.measured import pass_seconds, step_times


@pytest.mark.parametrize(
    ("rows", "chunk"),
    [(1, 0), (3, 0), (8, 0), (12, 0), (20, 0), (0, 16), (0, 100), (0, 200), (5, 16), (6, 8)],
)
def test_passes_between_and_beyond_the_measured_sizes_are_interpolated(rows: int, chunk: int) -> None:
    assert step_times().seconds(rows, chunk, 0) == pytest.approx(pass_seconds(rows, chunk))


def test_attention_costs_by_its_pairs_whatever_the_outliers() -> None:
    pairs = [100.0 * step for step in range(50)]
    seconds = [0.01 + 2e-6 * pair for pair in pairs]
    seconds[7] *= 30  # the process was suspended
    times = StepTimes([Cell(1, 0, pairs, seconds), Cell(0, 16, [0.0], [0.02])], mixed=True)
    assert times.slope == pytest.approx(2e-6)
    assert times.seconds(1, 0, 10_000) == pytest.approx(0.03)


def test_attention_never_makes_a_pass_faster() -> None:
    falling = Cell(1, 0, [0.0, 1000.0], [0.02, 0.015])
    assert StepTimes([falling, Cell(0, 16, [0.0], [0.02])], mixed=True).slope == 0


def test_noise_is_drawn_in_the_order_in_which_it_was_measured() -> None:
    series = [1.0 + number / 1000 for number in range(500)]
    times = StepTimes([Cell(1, 0, [0.0] * 500, series), Cell(0, 16, [0.0], [1.0])], mixed=True)
    noise = Noise(times, np.random.default_rng(1))
    drawn = np.array([noise.draw() for _ in range(3200)])
    steps = np.diff(drawn) * np.median(series)
    assert np.mean(np.isclose(steps, 0.001)) > 0.9  # but where a block ends
    assert drawn.mean() == pytest.approx(times.noise.mean(), rel=0.02)
    assert set(drawn) <= set(times.noise)


@pytest.mark.parametrize(
    ("decoding", "prompts", "expected"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1.0),
        ([1.0, 1.3, 1.0], [1.0, 1.0, 1.0], 1.3),  # the memory alone was slower for a while
        ([1.1, 1.1, 1.0], [1.2, 1.0, 1.0], 1.2),
        ([1.0, 5.0], [1.0], 1.0),  # too little to tell
    ],
)
def test_a_drift_between_the_rounds_is_told_whatever_it_slows(
    decoding: list[float], prompts: list[float], expected: float
) -> None:
    def series(rounds: list[float]) -> list[float]:
        once = len(rounds) < 3
        return [
            0.01 * one * (4.0 if number == 5 else 1.0) for one in rounds for number in range(1 if once else 9)
        ]

    sizes = [(rows, 0, series(decoding)) for rows in (1, 2, 4)] + [(0, 16, series(prompts))]
    found = StepTimes([Cell(rows, chunk, [0.0] * len(s), s) for rows, chunk, s in sizes], mixed=True)
    assert found.drift == pytest.approx(expected)
