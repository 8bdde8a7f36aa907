"""What a loader is given, what it returns, and how it fails.

LoaderError
├── ModelNotFound         no such folder or hub id, or the hub can't be reached
├── CheckpointError       found, but unusable: truncated, pickle-only, not a causal LM
├── UnknownPrecision      not in the registry
├── PrecisionUnavailable  in the registry, but this host can't run it
└── OutOfMemory           the device has no room for it
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Logits = Literal["none", "last", "all"]
Progress = Callable[[str, int, int], None]
"""Told (stage, current, total) as loading goes on; total is 0 where it isn't known."""

_PATH = re.compile(r"(?<!\w)/[^\s'\"`,;:)]+")


class LoaderError(Exception):
    """A model could not be loaded; the message is fit to be shown to a user."""


class ModelNotFound(LoaderError):
    pass


class CheckpointError(LoaderError):
    pass


class UnknownPrecision(LoaderError):
    def __init__(self, name: object, choices: Sequence[str]) -> None:
        self.choices = list(choices)
        shown = name if isinstance(name, str) and len(name) <= 40 else "that"
        self._made_of = name, choices
        super().__init__(f"unknown precision {shown!r}; choose from {', '.join(self.choices)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of


class PrecisionUnavailable(LoaderError):
    def __init__(self, precision: str, availability: "Availability") -> None:
        self.precision, self.availability = precision, availability
        mend = f" (mend it with: {availability.install})" if availability.install else ""
        super().__init__(f"{precision} can't run on this host: {availability.reason}{mend}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.precision, self.availability)


class OutOfMemory(LoaderError):
    pass


@dataclass(frozen=True)
class Availability:
    """Whether this host can run a precision and, if not, why and what command would mend it."""

    reason: str | None = None
    install: str | None = None

    @property
    def ok(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, found and checked, nothing loaded yet. Made by ``loaders.checkpoint``."""

    model_id: str
    """As asked for: ``bundled``, a folder's name (never its path) or a hub id."""
    revision: str | None
    """The hub commit, where there is one."""
    folder: Path
    config: Any
    """The ``transformers`` configuration."""
    architecture: str
    """Its model class, e.g. ``GPT2LMHeadModel``."""
    context_length: int
    """Most tokens one sequence may hold, prompt and continuation together."""
    vocabulary: int
    """Rows of the output head; valid token ids are 0 … vocabulary − 1."""
    eos_ids: frozenset[int]
    file_bytes: int
    """Size of the weight files on disk."""


@dataclass(frozen=True)
class ModelSpec:
    """One checkpoint and how it is to be loaded; the same for every precision of a server."""

    checkpoint: Checkpoint
    device: Literal["cpu", "cuda"] = "cpu"
    slots: int = 16
    """Sequences decoded together; each owns a KV slot of ``context`` tokens."""
    context: int | None = None
    """Cap on the tokens of one sequence; the checkpoint's context length if None."""
    threads: int | None = None
    """CPU threads of one forward pass; the thread that computes sets them. None: the caller decides."""
    quantize_lm_head: bool = True
    """dynamic-int8: quantize the output head too (a tied embedding then stays beside it in fp32)."""
    int8_threshold: float = 0.0
    """LLM.int8 outlier threshold. Above 0, outlier columns are picked over the whole batch, so that a
    row's result depends on its batch-mates, and every layer waits for the host."""
    double_quantization: bool = False
    """nf4, fp4: quantize the absmax of each block as well (about 0.37 bit per weight saved)."""
    unquantized_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """int8, nf4, fp4: the type of what is not quantized (embeddings, head, norms, biases)."""
    kv_dtype: Literal["auto", "fp32", "fp16"] = "auto"
    """Type of the KV cache where the compiled kernels run GPT-2; ``auto``: fp32 for fp32, else fp16.
    Elsewhere it is the model's own."""
    batch_invariant: bool = True
    """On a GPU: every decode step computes all slots, and every stretch of a prompt is of one length, so that
    a row's result doesn't depend on how many run beside it. Otherwise the smallest size that fits."""
    cuda_graphs: bool = True
    """On a GPU: steps are captured and replayed."""
    room: int | None = None
    """Bytes on the device for weights and KV cache together; what is free there if None."""

    @property
    def max_tokens(self) -> int:
        return min(self.context or self.checkpoint.context_length, self.checkpoint.context_length)


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
        ...

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        """``score`` of texts of one length, in one pass and after the last ``kept`` ids of each alone.

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


@dataclass(frozen=True)
class KeptLayer:
    """A weight matrix that was not quantized, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Footprint:
    """A loaded model's bytes, counted from its live tensors (shared storage once)."""

    weights_bytes: int
    """Everything the forward pass reads: weights, biases, norms, embeddings, scales, absmax."""
    by_dtype: Mapping[str, int]
    """The same bytes by element type, e.g. ``{"int8": …, "float32": …}``."""
    quantization_state: Mapping[str, int]
    """The part that describes quantization, by role: ``scales``, ``absmax``, ``zero_points``, ``tables`` …"""
    transformers_footprint_bytes: int
    """What ``model.get_memory_footprint()`` says: it leaves out scales and absmax."""
    bits_per_weight: float
    """Bits per parameter of the whole model, quantization state included."""
    parameters: int
    """Parameters of the checkpoint (a tied head counts once)."""
    lookup_bytes: int = 0
    """Of ``weights_bytes``, embeddings of which a step looks up a row: those that no output head shares."""
    quantized: Sequence[str] = ()
    """Names of the quantized weight matrices."""
    kept: Sequence[KeptLayer] = ()
    quantized_share: float = 0.0
    """Of the weights that are multiplied (embeddings are looked up), by their number."""

    @property
    def quantization_state_bytes(self) -> int:
        return sum(self.quantization_state.values())


@dataclass
class LoadedModel:
    """One precision of one checkpoint, ready to run."""

    precision: str
    runner: Runner
    footprint: Footprint
    load_seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the loader wants shown in ``/stats`` (compute dtype, block size, …)."""

    def close(self) -> None:
        self.runner.close()


def ignore_progress(stage: str, current: int, total: int) -> None:
    """The progress callback for callers that don't care."""


def in_short(error: BaseException) -> str:
    """An error of a library in one line and without paths, fit to be shown to a client."""
    if isinstance(error, OSError):
        return type(error).__name__
    said = _PATH.sub("…", " ".join(str(error).split()))
    return f"{type(error).__name__}: {said[:200]}".rstrip(": ")


def default_device() -> Literal["cpu", "cuda"]:
    return "cuda" if torch.cuda.is_available() else "cpu"
