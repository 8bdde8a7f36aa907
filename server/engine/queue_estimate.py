"""How long an engine will need for its sequences, from the durations of its latest steps.

A sequence needs a step for every chunk of its prompt and one for every token. Many end before
``max_new_tokens``, so that number is multiplied by the share of it that recent sequences generated. There is
no estimate until steps and whole sequences have been measured.
"""

import heapq
import math
import statistics
from collections import deque
from collections.abc import Iterable

from server.engine.sequence import Sequence, StepStats

_LEAST_WEIGHT = 0.02  # of the latest step in the moving average
_MARGIN = 1.05  # steps and lengths vary: a sequence estimated to finish just in time mostly finishes late
_WINDOW = 64  # latest sequences whose lengths are averaged


class QueueEstimate:
    """One per engine. Event loop only; the worker's changes during an estimate make it at most a step old.

    Args:
        slots: sequences decoded together.
        prefill_chunk: prompt tokens computed in a step that decodes as well.
    """

    def __init__(self, slots: int, prefill_chunk: int) -> None:
        self._slots, self._chunk = slots, prefill_chunk
        self._step_seconds: float | None = None
        self._steps_seen = 0
        self._shares: deque[float] = deque(maxlen=_WINDOW)

    def observe_step(self, stats: StepStats) -> None:
        """Records a step in which every slot was used.

        The queue may be empty, since the estimate itself may have caused refusals. The time from token to
        token is averaged: it contains prompt chunks and the steps of other engines.
        """
        if stats.gaps:
            self._steps_seen += 1
            weight = max(1 / self._steps_seen, _LEAST_WEIGHT)
            before = self._step_seconds or 0.0
            self._step_seconds = before + weight * (statistics.fmean(stats.gaps) - before)

    def observe_end(self, sequence: Sequence, late: bool = False) -> None:
        """Records a sequence that has finished or whose reader has closed it.

        Args:
            late: its deadline passed, so its full length is unknown.
        """
        if sequence.generated:
            share = len(sequence.generated) / sequence.params.max_new_tokens
            self._shares.append(1.0 if late else share)

    def drain_seconds(self, ahead: Iterable[Sequence]) -> float | None:
        """Seconds until all of them have finished; None before anything was measured."""
        if self._step_seconds is None or not self._shares:
            return None
        share = statistics.fmean(self._shares)
        left = sum(self._steps(one, share) for one in ahead)
        return left / self._slots * self._step_seconds

    def finish_seconds(self, ahead: Iterable[Sequence], prompt_tokens: int, new_tokens: int) -> float | None:
        """Seconds until a sequence queued behind them would have finished.

        None before anything was measured, or if a slot is free now.
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
        share_90 = sorted(self._shares)[len(self._shares) * 9 // 10]  # a single sequence may be a long one
        return (begun + new_tokens * share_90) * self._step_seconds * _MARGIN

    def _steps(self, sequence: Sequence, share: float) -> float:
        """Steps that the sequence still needs."""
        tokens = sequence.params.max_new_tokens - len(sequence.generated)
        return math.ceil(sequence.remaining_prompt / self._chunk) + tokens * share
