"""The protocol of a loaded model: token ids in, logits out, over KV slots; and optional extensions of it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from loaders.kv_cache.block_pool import BlockPool

Logits = Literal["none", "last", "all"]


class Runner(Protocol):
    """Computes a loaded model on token ids, with ``slots`` independent KV slots.

    Not thread-safe: a single thread makes every call. Returned logits are float32, on the host or the
    device, and valid until the next call.
    """

    slots: int
    context: int
    """Maximum tokens of a slot."""
    vocabulary: int

    @abstractmethod
    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        """Appends ``ids`` to the slot. Long prompts are computed in several calls.

        Returns the logits after the last id (1, vocabulary), after every id (len(ids), vocabulary), or
        None, depending on ``logits``.
        """
        ...

    @abstractmethod
    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Appends one id to each of the (distinct) slots; returns (len(slots), vocabulary) logits."""
        ...

    def score(self, ids: Sequence[int]) -> Tensor:
        """Teacher-forced logits (len(ids), vocabulary) of a text no longer than ``context``; uses no slot."""
        return self.score_together([ids], len(ids))[0]

    @abstractmethod
    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        """Teacher-forced logits of texts of equal length, in one pass; uses no slot.

        Returns the (len(texts), kept, vocabulary) logits after the last ``kept`` ids of each.
        """
        ...

    @abstractmethod
    def free(self, slot: int) -> None:
        """Empties the slot. Freeing an empty one does nothing."""
        ...

    @abstractmethod
    def close(self) -> None:
        """Drops the weights and the cache; later calls raise."""
        ...

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV tensors that exist now."""
        ...


@runtime_checkable
class MixedRunner(Protocol):
    """A runner that computes prompt and decode tokens together, in one pass over the weights."""

    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        """``prefill(slot, ids)`` and ``decode(slots, next_ids)`` in one pass; ``slot`` is not in ``slots``.

        Returns (1 + len(slots), vocabulary) logits: after the last of ``ids``, then of each slot.
        """
        ...


@runtime_checkable
class PagedRunner(Protocol):
    """A runner whose slots take blocks of ``pool`` as they grow.

    ``prefill``, ``decode`` and ``advance`` reserve the blocks that were not reserved before, or raise
    ``MemoryError``; after the pass they append its tokens. ``close`` closes the pool before the memory goes.
    A slot's table is read anew in every pass: an append may replace a block by an equal, shared one.
    """

    pool: BlockPool

    def attach(self, slot: int, ids: Sequence[int], owner: str | None) -> int:
        """As ``BlockPool.attach``: the next ``prefill`` continues after the returned number of tokens."""
        ...


@runtime_checkable
class GrowingRunner(Protocol):
    """A runner whose slots take memory as their sequences grow, and give it back with them."""

    token_bytes: float
    """Bytes that a sequence takes per token; fewer beyond the attention windows of some layers."""
    sequence_bytes: int
    """Bytes that it takes besides, at any length: the state of recurrent layers. 0 before the first pass."""


@runtime_checkable
class LengthRunner(Protocol):
    """A runner of a model whose computation of a text changes beyond some length."""

    def expect(self, slot: int, tokens: int) -> None:
        """Sets the length of a prompt before its first chunk; chunks are then computed as in one pass."""
        ...

    def catch_up(self, slot: int, tokens: int) -> bool:
        """Returns whether the slot is ready to decode one more token.

        If not, recomputes up to ``tokens`` of its tokens. ``decode`` recomputes all that remain.
        """
        ...


@runtime_checkable
class DeviceRunner(Protocol):
    """A runner on an accelerator, which can decode from tokens that are still on the device."""

    @property
    def working_bytes(self) -> int:
        """Bytes on the device beside weights and cache: inputs, workspace and outputs of steps."""
        ...

    def decode_from(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """``decode`` with the ids as an int64 tensor on the device, (len(slots),). Doesn't synchronize."""
        ...


@runtime_checkable
class ReportingRunner(Protocol):
    """A runner with state to show in ``/stats``."""

    def report(self) -> Mapping[str, Any]:
        """The runner's current state, for the details of its precision in ``/stats``. Thread-safe."""
        ...
