"""What computes for a loaded model: token ids in, logits out, over KV slots; and what some can beside it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

Logits = Literal["none", "last", "all"]


class Runner(Protocol):
    """A loaded model on token ids, with ``slots`` independent KV slots.

    Not thread-safe: one thread makes every call. Returned logits are float32, on the host or the
    device, and valid until the next call.
    """

    slots: int
    context: int
    """Tokens a slot can hold."""
    vocabulary: int

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        """Appends ``ids`` to what the slot holds.

        Returns the logits after the last id (1, vocabulary), after every id (len(ids), vocabulary), or
        None, as asked. Long prompts come in several calls.
        """
        ...

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Appends one id to each of the (distinct) slots; returns (len(slots), vocabulary) logits."""
        ...

    def score(self, ids: Sequence[int]) -> Tensor:
        """Teacher-forced logits (len(ids), vocabulary) of a text no longer than ``context``; no slot used."""
        return self.score_together([ids], len(ids))[0]

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        """Teacher-forced logits of texts of one length, in one pass, after the last ``kept`` ids of each.

        Returns (len(texts), kept, vocabulary) logits.
        """
        ...

    def free(self, slot: int) -> None:
        """Empties the slot. Freeing an empty one does nothing."""
        ...

    def close(self) -> None:
        """Drops the weights and the cache; the runner is of no more use."""
        ...

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV tensors that exist now."""
        ...


@runtime_checkable
class MixedRunner(Protocol):
    """A runner to which prompt tokens and decoded ones are the same: both in one pass over the weights."""

    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        """``prefill(slot, ids)`` and ``decode(slots, next_ids)`` at once, ``slot`` not being among ``slots``.

        Returns (1 + len(slots), vocabulary) logits: after the last of ``ids``, then of each slot.
        """
        ...


@runtime_checkable
class LengthRunner(Protocol):
    """A runner of models that may compute a text differently as soon as it is longer than some length."""

    def expect(self, slot: int, tokens: int) -> None:
        """Tokens of the whole prompt, before its first chunk: each chunk is computed as in one pass then."""
        ...

    def catch_up(self, slot: int, tokens: int) -> bool:
        """Whether one more token can be decoded in the slot at once.

        If not, up to ``tokens`` of what it holds are computed again. ``decode`` does all that is left.
        """
        ...


@runtime_checkable
class DeviceRunner(Protocol):
    """A runner on an accelerator, which can go on from tokens that the host has not seen yet."""

    @property
    def working_bytes(self) -> int:
        """Bytes on the device beside weights and cache: what steps read, compute in, and return."""
        ...

    def decode_from(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """``decode`` with the ids as an int64 tensor on the device, (len(slots),). Nothing waits for it."""
        ...


@runtime_checkable
class ReportingRunner(Protocol):
    """A runner that has more to tell of itself than its memory."""

    def report(self) -> Mapping[str, Any]:
        """What ``/stats`` shows among the details of the precision, as it is now. Any thread may ask."""
        ...
