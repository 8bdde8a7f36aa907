"""How long the sequences of an engine will take, from how long its latest steps took.

A sequence takes a step for every chunk of its prompt and one for every token. Sequences that end before
``max_new_tokens`` are counted in by the share of it that sequences generated lately. Until steps and whole
sequences were measured, nothing is estimated.
"""

import heapq
import math
import statistics
from collections import deque
from collections.abc import Iterable

from server.engine.sequence import Sequence, StepStats

_LEAST_WEIGHT = 0.02  # of the latest step in the moving average
_MARGIN = 1.05  # steps and lengths vary: what is thought to be finished just in time mostly isn't
_WINDOW = 64  # latest sequences whose lengths are looked at


class QueueEstimate:
    """One per engine. Event loop only; what the worker changes meanwhile makes an estimate older by a step.

    Args:
        slots: sequences decoded together.
        prefill_chunk: prompt tokens computed in a step that decodes, too.
    """

    def __init__(self, slots: int, prefill_chunk: int) -> None:
        self._slots, self._chunk = slots, prefill_chunk
        self._step_seconds: float | None = None
        self._steps_seen = 0
        self._shares: deque[float] = deque(maxlen=_WINDOW)

    def observe_step(self, stats: StepStats) -> None:
        """A step while every slot was in use, also where none waits: it may be the estimate that lets none.

        What counts is the time from token to token, of which prompts and other engines' steps are part.
        """
        if stats.gaps:
            self._steps_seen += 1
            weight = max(1 / self._steps_seen, _LEAST_WEIGHT)
            before = self._step_seconds or 0.0
            self._step_seconds = before + weight * (statistics.fmean(stats.gaps) - before)

    def observe_end(self, sequence: Sequence, late: bool = False) -> None:
        """A sequence was generated to its end, or to where its reader closed it.

        Args:
            sequence: as it is then.
            late: its time was up; how long it would have become is not known.
        """
        if sequence.generated:
            share = len(sequence.generated) / sequence.params.max_new_tokens
            self._shares.append(1.0 if late else share)

    def drain_seconds(self, ahead: Iterable[Sequence]) -> float | None:
        """Until all of them are served; None if that is not known."""
        if self._step_seconds is None or not self._shares:
            return None
        share = statistics.fmean(self._shares)
        left = sum(self._steps(one, share) for one in ahead)
        return left / self._slots * self._step_seconds

    def finish_seconds(self, ahead: Iterable[Sequence], prompt_tokens: int, new_tokens: int) -> float | None:
        """Until a sequence that comes behind them would be served.

        None if that is not known, or if a slot is free for it now.
        """
        if self._step_seconds is None or not self._shares:
            return None
        share = statistics.fmean(self._shares)
        free_after: list[float] = []  # steps, of each slot: a heap
        prompts = prompt_tokens
        for one in ahead:
            steps = self._steps(one, share)
            prompts += one.remaining_prompt
            if len(free_after) < self._slots:
                heapq.heappush(free_after, steps)
            else:
                heapq.heapreplace(free_after, free_after[0] + steps)
        if len(free_after) < self._slots:
            return None
        begun = max(free_after[0] + math.ceil(prompt_tokens / self._chunk), prompts / self._chunk)
        most = sorted(self._shares)[len(self._shares) * 9 // 10]  # many average out, one may be a long one
        return (begun + new_tokens * most) * self._step_seconds * _MARGIN

    def _steps(self, sequence: Sequence, share: float) -> float:
        """That are left of it."""
        tokens = sequence.params.max_new_tokens - len(sequence.generated)
        return math.ceil(sequence.remaining_prompt / self._chunk) + tokens * share
