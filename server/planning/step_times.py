"""How long a forward pass takes, from measured passes: its median, and a noise of theirs that is drawn.

A pass computes ``chunk`` prompt tokens of one sequence, or decodes ``rows`` rows, or both. Its median is
interpolated between the measured cells, and grows with ``pairs``: the (token, key) pairs that its attention
computes. The noise is the series of measured seconds ÷ their median, in the order of measuring, drawn in
blocks, since what disturbs a host lasts for many passes (moving-block bootstrap: Künsch 1989).
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 3
"""All cells are measured so many times in turn: what disturbs the host for some seconds is then in a minority
of a cell's passes. The series of a cell is one round's after the other's, of about equal length."""
_BLOCK = 32  # passes whose noise is drawn together
_OUTLIER = 1.5  # × a cell's median: such passes say nothing about the slope
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Measured passes of one size, in the order of measuring.

    Args:
        pairs: (token, key) pairs of each pass.
        seconds: from a pass's start to the next one's, sampling and scheduling included.
    """

    rows: int
    chunk: int
    pairs: Sequence[float]
    seconds: Sequence[float]


class StepTimes:
    """Seconds of passes.

    Args:
        cells: at least those of one row and of one prompt chunk.
        mixed: whether prompt and decode tokens are computed in one pass.
    """

    def __init__(self, cells: Sequence[Cell], mixed: bool) -> None:
        self.mixed = mixed
        self.slope = _slope(cells)
        self._bases: dict[int, list[tuple[int, float]]] = defaultdict(list)  # by rows: (chunk, seconds)
        noise: list[Floats] = []
        self._drifts: dict[bool, list[list[float]]] = {False: [], True: []}  # by whether a prompt is computed
        for cell in cells:
            flat = np.array(cell.seconds) - self.slope * np.array(cell.pairs)
            base = float(np.median(flat))
            self._bases[cell.rows].append((cell.chunk, base))
            noise.append(np.array(cell.seconds) / (base + self.slope * np.array(cell.pairs)))
            if len(cell.seconds) >= ROUNDS:
                rounds = np.array_split(noise[-1], ROUNDS)
                self._drifts[cell.chunk > 0].append([float(np.median(one)) for one in rounds])
        self.noise: Floats = np.concatenate(noise)
        """Measured ÷ median seconds of all passes."""
        one_row = dict(self._bases[1])[0]
        self._bases[0].append((1, one_row))  # a prompt of one token is computed like a row
        for known in self._bases.values():
            known.sort()
        self._rows = sorted(self._bases)[1:]
        self._known: dict[tuple[int, int], float] = {}

    @property
    def disturbance(self) -> float:
        """The 99th percentile of the noise: 1 on a host that nothing else uses, nearly."""
        return float(np.quantile(self.noise, 0.99))

    @property
    def drift(self) -> float:
        """How far the host's speed changed from round to round: the slowest one ÷ the fastest one.

        A round is the median over its cells. Passes that only decode are bound by the memory, the others by
        the cores, which drift apart: the larger figure of both kinds.
        """
        kinds = [np.median(found, axis=0) for found in self._drifts.values() if found]
        return max((float(kind.max() / kind.min()) for kind in kinds), default=1.0)

    def seconds(self, rows: int, chunk: int, pairs: float) -> float:
        """The median."""
        base = self._known.get((rows, chunk))
        if base is None:
            base = self._known[rows, chunk] = self._base(rows, chunk)
        return base + self.slope * pairs

    def prefill_seconds(self, prompt: int, chunk: int) -> float:
        """Median seconds of a prompt in chunks of up to ``chunk`` tokens while nothing decodes."""
        starts = range(0, prompt, chunk)
        sizes = [min(chunk, prompt - start) for start in starts]
        pairs = [size * (start + size / 2) for start, size in zip(starts, sizes, strict=True)]
        return sum(self.seconds(0, size, held) for size, held in zip(sizes, pairs, strict=True))

    def _base(self, rows: int, chunk: int) -> float:
        if not rows:
            return _interpolated(self._bases[0], chunk)
        at = min(max(bisect_right(self._rows, rows), 1), len(self._rows) - 1)
        around = self._rows[max(at - 1, 0) : at + 1]
        return _interpolated([(known, _interpolated(self._bases[known], chunk)) for known in around], rows)


class Noise:
    """Draws from ``StepTimes.noise``."""

    def __init__(self, times: StepTimes, random: np.random.Generator) -> None:
        self._series: list[float] = times.noise.tolist()
        self._random = random
        self._at = self._end = 0

    def draw(self) -> float:
        if self._at == self._end:
            self._at = int(self._random.integers(max(len(self._series) - _BLOCK, 1)))
            self._end = min(self._at + _BLOCK, len(self._series))
        self._at += 1
        return self._series[self._at - 1]


def _interpolated(points: Sequence[tuple[int, float]], at: int) -> float:
    """Linear between points, and beyond the last two; below the first as there."""
    if len(points) == 1 or at <= points[0][0]:
        return points[0][1]
    upper = next((i for i, (known, _) in enumerate(points) if known >= at), len(points) - 1)
    (x0, y0), (x1, y1) = points[upper - 1 : upper + 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _slope(cells: Sequence[Cell]) -> float:
    """Seconds per pair: least squares within the cells; never negative."""
    over = under = 0.0
    for cell in cells:
        seconds, pairs = np.array(cell.seconds), np.array(cell.pairs)
        kept = seconds <= _OUTLIER * np.median(seconds)
        if kept.sum() > 1:
            centred = pairs[kept] - pairs[kept].mean()
            over += float(centred @ (seconds[kept] - seconds[kept].mean()))
            under += float(centred @ centred)
    return max(over / under, 0.0) if under else 0.0
