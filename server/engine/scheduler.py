"""Who runs next. Pure Python on sequences: no tensors, no clock of its own, no threads."""

import heapq
from collections import deque
from dataclasses import dataclass
from itertools import chain

from server.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """A chunk of a sequence's prompt to prefill in this step."""

    sequence: Sequence
    count: int

    @property
    def is_last(self) -> bool:
        return self.count == self.sequence.remaining_prompt


class Scheduler:
    """First come, first served into ``slots`` KV slots; everything admitted advances in every step.

    A step prefills at most ``prefill_chunk`` prompt tokens, ``prefill_chunk_busy`` where rows decode, so
    that a long prompt delays their next token by no more than that; and it decodes all rows that can.
    """

    def __init__(self, slots: int, prefill_chunk: int, prefill_chunk_busy: int | None = None) -> None:
        self._idle_budget = prefill_chunk
        self._busy_budget = min(prefill_chunk, prefill_chunk_busy or prefill_chunk)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # by slot, oldest first
        self._free = list(range(slots))  # a heap: low slots first keep the rows in play consecutive

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def admit(self, now: float) -> list[Sequence]:
        """Moves waiting sequences into free slots; returns those that just got one."""
        admitted = []
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            sequence.timeline.admitted = now
            self._running[sequence.slot] = sequence
            admitted.append(sequence)
        return admitted

    def chunks(self) -> list[Chunk]:
        """The prompt chunks of this step, oldest sequence first, within the step's budget of tokens."""
        chunks, budget = [], self.budget
        for sequence in self._running.values():
            if sequence.generated:
                continue
            if budget and sequence.remaining_prompt:
                chunk = Chunk(sequence, min(budget, sequence.remaining_prompt, sequence.chunk or budget))
                chunks.append(chunk)
                budget -= chunk.count
        return chunks

    @property
    def budget(self) -> int:
        """Most prompt tokens of a step."""
        decoding = any(sequence.generated for sequence in self._running.values())
        return self._busy_budget if decoding else self._idle_budget

    def decodable(self) -> list[Sequence]:
        """The sequences that have a token to go on from, which means that their prompt is done, by slot."""
        return [sequence for _, sequence in sorted(self._running.items()) if sequence.generated]

    def remove(self, sequence: Sequence) -> int | None:
        """Forgets a sequence wherever it is; returns the slot that it held, now free for another."""
        if sequence.slot is None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            return None
        slot, sequence.slot = sequence.slot, None
        del self._running[slot]
        heapq.heappush(self._free, slot)
        return slot

    def unwanted(self, now: float) -> list[Sequence]:
        """Those whose client has gone or whose time is up, running or waiting."""
        everyone = chain(self._running.values(), self._waiting)
        return [s for s in everyone if s.cancelled or (s.deadline is not None and now >= s.deadline)]

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)
