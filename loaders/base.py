"""The arguments of a loader and its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from loaders.kv_cache.budget import KVBudget
from loaders.runner import Runner

Progress = Callable[[str, int, int], None]
"""Called with (stage, current, total) during loading; total is 0 where it is unknown."""


@dataclass(frozen=True)
class Availability:
    """Whether a precision can be served here; if not, why, and the command that installs what is missing."""

    reason: str | None = None
    install: str | None = None

    @property
    def ok(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, found and checked but not loaded; returned by ``loaders.checkpoint``."""

    model_id: str
    """``bundled``, the name of a folder (never its path) or a hub id."""
    revision: str | None
    """The hub commit; None for a folder and the bundled model."""
    folder: Path
    config: Any
    """The ``transformers`` configuration."""
    architecture: str
    """Its model class, e.g. ``GPT2LMHeadModel``."""
    context_length: int
    """Maximum tokens of one sequence, prompt and continuation together."""
    vocabulary: int
    """Rows of the output head; valid token ids are 0 … vocabulary − 1."""
    eos_ids: frozenset[int]
    file_bytes: int
    """Size of the weight files on disk."""
    saved: str | None = None
    """The precision that its files are quantized in; None: the original weights, for every precision."""


@dataclass(frozen=True)
class ModelSpec:
    """One checkpoint and the options for loading it; the same for every precision of a server."""

    checkpoint: Checkpoint
    device: Literal["cpu", "cuda"] = "cpu"
    slots: int = 16
    """Sequences decoded together; each owns a KV slot of ``context`` tokens."""
    context: int | None = None
    """Cap on the tokens of one sequence; the checkpoint's context length if None."""
    threads: int | None = None
    """CPU threads of one forward pass, set by the thread that computes. None: its setting is kept."""
    quantize_lm_head: bool = True
    """dynamic-int8, qat-int8, qat-int4: quantize the output head too, to int8. On the kernels a tied
    embedding is looked up in it."""
    int8_threshold: float = 0.0
    """LLM.int8 outlier threshold. Above 0, outlier columns are selected over the whole batch: a row's result
    depends on the other rows, and every layer synchronizes with the host."""
    double_quantization: bool = False
    """nf4, fp4: quantize the absmax of each block as well (saves about 0.37 bit per weight)."""
    unquantized_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """int8, nf4, fp4: the type of the tensors that are not quantized (embeddings, head, norms, biases)."""
    lm_head_dtype: Literal["auto", "int8", "fp32", "bf16", "fp16"] = "auto"
    """nf4, fp4, static-int8 on a CPU: the type of the output head; ``auto``: int8 on the compiled kernels,
    else as ``unquantized_dtype``. If the types differ, a head tied to the embedding gets its own weights; in
    int8 the embedding is looked up in them."""
    calibration: Path | None = None
    """Text that calibrated precisions read, in UTF-8; None: the corpus' prose that is not held out."""
    training_steps: int = 200
    """qat-int8, qat-int4: updates of the weights in quantization-aware training."""
    granularity: Literal["group", "channel"] = "group"
    """qat-int8: what shares a scale in training: groups of weights and of activations, as on the compiled
    kernels; or all weights of an output and all activations of a row, as in LiteRT."""
    artifacts: Path | None = None
    """Folder of the files that precisions make once; None: the user's cache."""
    artifacts_limit: int | None = None
    """Most bytes of that folder: beyond it the least recently used files are removed; None: no bound."""
    kv_dtype: Literal["auto", "fp32", "fp16"] = "auto"
    """Type of the KV cache of the compiled forward pass; ``auto``: fp32 for fp32, else fp16.
    Other runners use the type of the model."""
    batch_invariant: bool = True
    """On a GPU: every decode step computes all slots and every prompt chunk has one length, so that a row's
    result doesn't depend on the batch size. Otherwise steps use the smallest captured size that fits."""
    cuda_graphs: bool = True
    """On a GPU: capture steps as CUDA graphs and replay them."""
    kv_budget: KVBudget | None = None
    """On a CPU: the memory of the KV caches of all precisions together; None: a runner's own, unlimited."""
    room: int | None = None
    """Bytes on the device for weights and KV cache together; if None, all of its free memory."""

    @property
    def max_tokens(self) -> int:
        return min(self.context or self.checkpoint.context_length, self.checkpoint.context_length)


@dataclass(frozen=True)
class Recipe:
    """How a precision's files are made: everything that they depend on, besides the checkpoint.

    Args:
        method: the precision's name.
        options: everything that changes their bytes: group size, observer, samples, seed … and ``format``, a
            number that is raised whenever the same options begin to give other bytes.
        packages: distributions whose versions change the bytes.
        calibrated: whether the calibration text does.
    """

    method: str
    options: Mapping[str, str | int | float | bool | None]
    packages: tuple[str, ...] = ()
    calibrated: bool = False


@dataclass(frozen=True)
class KeptLayer:
    """A weight matrix that was not quantized, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Footprint:
    """A loaded model's bytes, counted from its live tensors (shared storage once)."""

    weights_bytes: int
    """All tensors that the forward pass reads: weights, biases, norms, embeddings, scales, absmax."""
    by_dtype: Mapping[str, int]
    """The same bytes by element type, e.g. ``{"int8": …, "float32": …}``."""
    quantization_state: Mapping[str, int]
    """Bytes of quantization state by role: ``scales``, ``absmax``, ``zero_points``, ``tables`` …"""
    transformers_footprint_bytes: int
    """The result of ``model.get_memory_footprint()``, which leaves out scales and absmax."""
    bits_per_weight: float
    """Bits per parameter of the whole model, quantization state included."""
    parameters: int
    """Parameters of the checkpoint (a tied head counts once)."""
    lookup_bytes: int = 0
    """Bytes of embeddings that no output head shares; a step reads single rows of them."""
    quantized: Sequence[str] = ()
    """Names of the quantized weight matrices."""
    kept: Sequence[KeptLayer] = ()
    quantized_share: float = 0.0
    """Quantized fraction of the weights in matrix products; embeddings, which are looked up, don't count."""

    @property
    def quantization_state_bytes(self) -> int:
        return sum(self.quantization_state.values())


def _interactive(module: str) -> Any:
    """A module of a layer above this one: it describes a loaded model, or runs it."""
    return import_module(f"loaders.interactive.{module}")


@dataclass(repr=False)
class LoadedModel:
    """One precision of one checkpoint, ready to run; a notebook shows its proof as tables."""

    precision: str
    runner: Runner
    footprint: Footprint
    load_seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further facts for ``/stats`` (compute dtype, block size, …)."""
    spec: ModelSpec | None = None
    """The checkpoint and the options that it was loaded with; set by ``loaders.load``."""

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's ``transformers`` tokenizer, loaded when it is first used.

        Raises:
            CheckpointError: there is none, or it is broken.
            ValueError: the model was not loaded by ``loaders.load``.
        """
        if self.spec is None:
            raise ValueError("the model's checkpoint is not known")
        return import_module("loaders.checkpoint").load_tokenizer(self.spec.checkpoint)

    def generate(self, text: str, max_new_tokens: int = 64) -> str:
        """The greedy continuation of ``text``, without it: up to ``max_new_tokens``, or to an end token.

        One thread at a time: the runner's first slot computes it, which must be free, and is freed again.

        Raises:
            ValueError: the prompt has no tokens, or the context has no room for it and the new tokens.
            CheckpointError: the checkpoint has no usable tokenizer.
        """
        continuation: str = _interactive("text").generate(self, text, max_new_tokens)
        return continuation

    def __repr__(self) -> str:
        line: str = _interactive("proof").line(self)
        return line

    def _repr_html_(self) -> str:
        html: str = _interactive("proof").as_html(self)
        return html

    def close(self) -> None:
        self.runner.close()


def ignore_progress(stage: str, current: int, total: int) -> None:
    """A progress callback that does nothing."""


def default_device() -> Literal["cpu", "cuda"]:
    return "cuda" if torch.cuda.is_available() else "cpu"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
