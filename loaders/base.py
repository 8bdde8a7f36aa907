"""What a loader is given, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from loaders.runner import Runner

Progress = Callable[[str, int, int], None]
"""Told (stage, current, total) as loading goes on; total is 0 where it isn't known."""


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
    """On a GPU: every decode step computes all slots, and every chunk of a prompt is of one length, so that
    a row's result doesn't depend on how many run beside it. Otherwise the smallest size that fits."""
    cuda_graphs: bool = True
    """On a GPU: steps are captured and replayed."""
    room: int | None = None
    """Bytes on the device for weights and KV cache together; what is free there if None."""

    @property
    def max_tokens(self) -> int:
        return min(self.context or self.checkpoint.context_length, self.checkpoint.context_length)


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


def default_device() -> Literal["cpu", "cuda"]:
    return "cuda" if torch.cuda.is_available() else "cpu"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
