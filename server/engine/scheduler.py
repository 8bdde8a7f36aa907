"""Which sequences run in the next step. Pure Python on sequences: no tensors, no clock, no threads."""

import heapq
from collections import deque
from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from server.engine.paged_slots import PagedSlots
from server.engine.sequence import Sequence, Status

_slot = attrgetter("slot")


class Chunk(NamedTuple):
    """A chunk of a sequence's ``prefill_ids`` to compute in this step."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool

    @property
    def ids(self) -> list[int]:
        return self.sequence.prefill_ids[self.start : self.start + self.length]


class Plan(NamedTuple):
    """What a step does."""

    expired: list[Sequence]
    """Finished in this call: cancelled or past their deadline."""
    chunks: list[Chunk]
    """Oldest sequence first."""
    rows: list[Sequence]
    """Sequences to decode, by slot; each has at least one generated token."""
    token_budget: int
    """Most prompt tokens of the step."""


class Scheduler:
    """First come, first served into ``slots`` KV slots; every running sequence advances in every step.

    Where the slots are paged, a sequence is admitted when it gets blocks as well. If a row gets none for its
    next token, the youngest sequence is preempted: it waits in front of all others, and is computed again.

    A step prefills at most ``prefill_chunk`` prompt tokens, ``prefill_chunk_busy`` where rows decode, so
    that a long prompt delays their next token by no more than that; and it decodes all rows.

    Args:
        on_free: is called with each slot whose sequence has finished or was preempted, before it is used
            again.
        paging: None where every slot has the memory of its whole context.
    """

    def __init__(
        self,
        slots: int,
        prefill_chunk: int,
        prefill_chunk_busy: int | None = None,
        on_free: Callable[[int], object] = lambda slot: None,
        paging: PagedSlots | None = None,
    ) -> None:
        self._idle_budget = prefill_chunk
        self._busy_budget = min(prefill_chunk, prefill_chunk_busy or prefill_chunk)
        self._on_free, self._paging = on_free, paging
        self.preemptions = 0
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # by slot, oldest first
        self._free_slots = list(range(slots))  # a heap: low slots first keep the decoded rows consecutive

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def schedule(self, now: float) -> Plan:
        """Finishes expired sequences, gives rows their blocks, admits waiting sequences, and plans the step.

        Args:
            now: ``time.perf_counter()`` seconds.
        """
        expired = self._expire(now)
        if self._paging is None or self._grow(self._paging):
            self._admit(now)
        rows = [sequence for sequence in self._running.values() if not sequence.remaining_prompt]
        rows.sort(key=_slot)
        budget = self._busy_budget if rows else self._idle_budget
        chunks = self._chunks(budget) if len(rows) < len(self._running) else []
        return Plan(expired, chunks, rows, budget)

    def finish(self, sequence: Sequence) -> None:
        """Removes a running or waiting sequence and frees its slot; no effect on a finished one."""
        if sequence.status is Status.RUNNING:
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.slot]
        heapq.heappush(self._free_slots, sequence.slot)
        self._on_free(sequence.slot)

    def _grow(self, paging: PagedSlots) -> bool:
        """Gives each row, the oldest first, room for its next token; False if any sequence was preempted."""
        before = self.preemptions
        for row in list(self._running.values()):
            if row.remaining_prompt:
                continue  # its room was taken when it was admitted
            while row.status is Status.RUNNING and not paging.grow(row.slot):
                self._preempt(next(reversed(self._running.values())))
        return self.preemptions == before

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.preempt()
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _expire(self, now: float) -> list[Sequence]:
        sequences = chain(self._running.values(), self._waiting)
        expired = [s for s in sequences if s.cancelled or (s.deadline is not None and now >= s.deadline)]
        for sequence in expired:
            self.finish(sequence)
        return expired

    def _admit(self, now: float) -> None:
        paging = self._paging
        while self._waiting and self._free_slots:
            sequence, slot = self._waiting[0], self._free_slots[0]
            if paging is not None and not paging.admit(sequence, slot, len(self._running)):
                return
            self._waiting.popleft()
            sequence.slot, sequence.status = heapq.heappop(self._free_slots), Status.RUNNING
            if sequence.timeline.admitted is None:
                sequence.timeline.admitted = now
            self._running[slot] = sequence
        if paging is not None and not self._waiting:
            paging.stop_waiting()

    def _chunks(self, budget: int) -> list[Chunk]:
        chunks = []
        for sequence in self._running.values():
            if not (budget and sequence.remaining_prompt):
                continue
            if self._paging is not None:
                self._paging.attach_again(sequence)
            remaining = sequence.remaining_prompt
            length = min(budget, remaining, sequence.chunk or budget)
            chunks.append(Chunk(sequence, sequence.prefilled, length, is_last=length == remaining))
            budget -= length
        return chunks

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)
