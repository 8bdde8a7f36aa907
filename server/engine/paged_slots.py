"""Slots that take blocks of a pool as their sequences grow: who is admitted, and which prefix is cached."""

from loaders.runner import PagedRunner, Runner
from server.engine.sequence import Sequence


class PagedSlots:
    """Takes and shares blocks for the scheduler, on the worker's thread.

    Args:
        runner: it frees the blocks of the slots that the scheduler frees.
    """

    def __init__(self, runner: PagedRunner) -> None:
        self._runner, self._pool = runner, runner.pool
        self._waits = False
        self._refused: tuple[Sequence, int] | None = None  # and the budget's version then

    @classmethod
    def of(cls, runner: Runner) -> "PagedSlots | None":
        """None for a runner whose slots have their memory from the beginning."""
        return cls(runner) if isinstance(runner, PagedRunner) else None

    def admit(self, sequence: Sequence, slot: int, running: int) -> bool:
        """Takes the blocks for all ids that the sequence has; False, and none is taken, if it has to wait.

        One block for each running sequence must be left: otherwise the next steps would preempt the new one.
        A sequence that exceeds the whole budget is admitted without blocks, so that its pass fails.
        """
        pool, tokens, known = self._pool, len(sequence.prefill_ids), _known_ids(sequence)
        if tokens > pool.capacity:
            return True
        if self._refused == (sequence, pool.budget.version):
            return False
        with pool.budget.lock:
            if not pool.may_admit(tokens, known, sequence.owner, running):
                self._waits, self._refused = True, (sequence, pool.budget.version)
                return False
            self._waits, self._refused = False, None
            self._attach(sequence, slot)
            reserved = pool.reserve(slot, tokens - sequence.prefilled)
        assert reserved, "admission was promised under the lock"
        return True

    def attach_again(self, sequence: Sequence) -> None:
        """Before the first chunk: takes what became known since the admission, as from an equal prompt."""
        if sequence.prefilled == sequence.attached and len(sequence.prefill_ids) <= self._pool.capacity:
            self._attach(sequence, sequence.slot)

    def grow(self, slot: int) -> bool:
        """Takes a block if the slot's next token needs one; False if there is none."""
        return self._pool.reserve(slot, 1)

    def stop_waiting(self) -> None:
        """Lets other precisions admit sequences, once none waits here."""
        if self._waits:
            self._waits = False
            self._pool.stop_waiting()

    def _attach(self, sequence: Sequence, slot: int) -> None:
        if sequence.owner is None:
            return
        found = self._runner.attach(slot, _known_ids(sequence), sequence.owner)
        sequence.prefilled = sequence.attached = found
        if not sequence.preemptions:
            sequence.cached_tokens = found


def _known_ids(sequence: Sequence) -> list[int]:
    """The ids to look for in the cache: none where every prompt token is to be computed."""
    return [] if sequence.owner is None or sequence.needs_all_logits else sequence.prefill_ids
