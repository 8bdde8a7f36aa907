"""Which samples of a calibration text find ranges, and which measure their errors."""

import numpy as np
import pytest

from loaders.litert.calibrate import observed_and_judged


@pytest.mark.parametrize("count", [4, 5, 16])
def test_errors_are_measured_on_other_samples(count: int) -> None:
    samples = np.arange(count)[:, None]
    observed, judged = observed_and_judged(samples)
    assert len(judged) == count // 4
    assert sorted([*observed[:, 0], *judged[:, 0]]) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_samples_do_both(count: int) -> None:
    samples = np.arange(count)[:, None]
    assert [len(part) for part in observed_and_judged(samples)] == [count, count]
