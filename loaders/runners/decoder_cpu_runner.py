"""The Runner of decoders on a CPU: a step is one call into C; ``transformers``' forward makes thousands.

Every token is a row: (slot, position, id). Prompt chunks and decode steps are the same computation on
    different rows, and each row's result depends on its past alone; so neither the batch nor the chunks of
    a prompt change a bit of it, nor whether its past was computed for this sequence or is shared with
    another. Tests compare it with ``transformers``' forward.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders import kernels
from loaders.architectures import Architecture
from loaders.base import ModelSpec
from loaders.kv_cache.block_memory import PAGE, BlockMemory
from loaders.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from loaders.kv_cache.budget import KVBudget
from loaders.kv_cache.scratch import ScratchBlocks
from loaders.layers.native_linear import NativeLinear
from loaders.runner import Logits, Runner
from loaders.runners.packing import pack

_log = logging.getLogger(__name__)

FORWARD = "compiled"
"""The name of this runner's forward pass in ``/stats``."""


class DecoderCPURunner(Runner):
    """Implements ``MixedRunner``, ``PagedRunner`` and ``ReportingRunner`` as well.

    If keys or values don't fit into float16, the cache becomes float32 and the pass is computed again. What
    does fit stays rounded to float16, so that no bit changes for other sequences.
    """

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, architecture: Architecture) -> None:
        """
        Raises:
            UnsupportedArchitecture: the compiled forward pass can't compute the model.
            CacheTooSmall: the KV budget doesn't hold one sequence.
        """
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self._compute: kernels.Decoder | None = pack(model, architecture, self.context)  # None once closed
        self._model: PreTrainedModel | None = model
        self._shape, self._layers = architecture.shape, len(architecture.windows)
        self._half, self._widened = _fits_half(model, spec), False
        budget = spec.kv_budget or KVBudget(None)
        self.pool = BlockPool(self.slots, self.context, self._block_bytes(), budget, self._release)
        self._memory = BlockMemory(self.pool.blocks, self._block_bytes())
        self._tables = _Tables(self.slots, self.context)

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        start, count = self.pool.length(slot), len(ids)
        wanted = {"none": 0, "last": 1, "all": count}[logits]
        self._reserve(slot, count)
        found = self._pass([slot] * count, range(start, start + count), ids, wanted)
        self._append(slot, ids)
        return found if wanted else None

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        for slot in slots:
            self._reserve(slot, 1)
        logits = self._pass(slots, [self.pool.length(slot) for slot in slots], ids, len(ids))
        for slot, id_ in zip(slots, ids, strict=True):
            self._append(slot, [id_])
        return logits

    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        start, count = self.pool.length(slot), len(ids)
        self._reserve(slot, count)
        for other in slots:
            self._reserve(other, 1)
        positions = [*range(start, start + count), *(self.pool.length(other) for other in slots)]
        logits = self._pass([*[slot] * count, *slots], positions, [*ids, *next_ids], 1 + len(slots))
        self._append(slot, ids)
        for other, id_ in zip(slots, next_ids, strict=True):
            self._append(other, [id_])
        return logits

    def attach(self, slot: int, ids: Sequence[int], owner: str | None) -> int:
        self._tables.clear(slot)
        return self.pool.attach(slot, ids, owner)

    def free(self, slot: int) -> None:
        self.pool.free(slot)  # a row attends only to what its own table holds
        self._tables.clear(slot)

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        count, length = len(texts), len(texts[0])
        self._check(length)
        return self._widening(lambda: self._scored(texts, kept).view(count, kept, self.vocabulary))

    def _scored(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        count, length = len(texts), len(texts[0])
        per_text = -(-length // BLOCK_TOKENS)
        tables = np.arange(count * per_text, dtype=np.int32).reshape(count, per_text)
        with ScratchBlocks(self.pool.budget, tables.size, self._block_bytes()):
            memory = BlockMemory(tables.size, self._block_bytes())
            cache, skipped = self._blocks(memory, tables), length - kept
            if skipped:  # a separate pass, since in a pass the rows without logits come first
                self._chunks(cache, texts, 0, skipped, wanted=0)
            return self._chunks(cache, texts, skipped, length, wanted=count * kept)

    def _chunks(
        self, cache: kernels.KVBlocks, texts: Sequence[Sequence[int]], start: int, end: int, wanted: int
    ) -> Tensor:
        """Computes the same chunk of every text; text i is in slot i."""
        slots = [slot for slot in range(len(texts)) for _ in range(start, end)]
        ids = [id_ for text in texts for id_ in text[start:end]]
        return self._live(cache, slots, [*range(start, end)] * len(texts), ids, wanted)

    def close(self) -> None:
        self._model = self._compute = None
        self.pool.close()
        self._memory = BlockMemory(0, PAGE)

    def report(self) -> Mapping[str, Any]:
        """For ``/stats``."""
        kind = "float16" if self._half else "float32"
        widened = f"{kind}, since float16 did not hold it"
        return {"forward": FORWARD, "kv_cache_dtype": widened if self._widened else kind}

    @property
    def module(self) -> PreTrainedModel:
        """The model with the weights."""
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    @property
    def kv_cache_bytes(self) -> int:
        return self.pool.committed_bytes

    def _pass(
        self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int], wanted: int
    ) -> Tensor:
        """A pass over the slots, whose blocks are reserved; doesn't append to the pool."""
        return self._widening(
            lambda: self._live(self._blocks(self._memory, self._tables.array), slots, positions, ids, wanted)
        )

    def _reserve(self, slot: int, tokens: int) -> None:
        self._check(self.pool.length(slot) + tokens)
        if not self.pool.reserve(slot, tokens):
            raise MemoryError("the KV cache has no block left")
        self._tables.update(slot, self.pool.table(slot))

    def _append(self, slot: int, ids: Sequence[int]) -> None:
        filled = self.pool.length(slot) // BLOCK_TOKENS
        self.pool.append(slot, ids)
        if self.pool.length(slot) // BLOCK_TOKENS > filled:
            self._tables.clear(slot)  # a full block may be replaced by an equal, shared one

    def _widening(self, compute: Callable[[], Tensor]) -> Tensor:
        try:
            return compute()
        except kernels.BeyondHalf:
            self._widen()
            return compute()

    def _widen(self) -> None:
        """Replaces the cache by one in float32 with the same contents and twice the memory.

        Raises:
            MemoryError: the KV budget or the system has no room for it; the cache is then as before.
        """
        _log.warning("keys or values do not fit into float16: the KV cache is float32 from now on")
        narrow = self._memory
        wide = BlockMemory(self.pool.blocks, self._block_bytes(half=False))
        if not self.pool.widen(wide.block_bytes):
            raise MemoryError("the KV budget has no room for a cache in float32")
        elements = self._elements()
        for block in {block for slot in range(self.slots) for block in self.pool.table(slot)}:
            values = narrow.block(block, torch.float16)[:elements]
            wide.block(block, torch.float32)[:elements].copy_(values)
        self._memory, self._half, self._widened = wide, False, True

    def _release(self, blocks: Sequence[int]) -> None:
        self._memory.release(blocks)

    def _elements(self) -> int:
        """Keys and values of a block."""
        return 2 * self._layers * self._shape.kv_heads * BLOCK_TOKENS * self._shape.head_dim

    def _block_bytes(self, half: bool | None = None) -> int:
        half = self._half if half is None else half
        return -(-self._elements() * (2 if half else 4) // PAGE) * PAGE

    def _blocks(
        self, memory: BlockMemory, tables: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    ) -> kernels.KVBlocks:
        return kernels.KVBlocks(memory.address, memory.block_bytes, tables, self._half, self._widened)

    @property
    def _live(self) -> kernels.Decoder:
        if self._compute is None:
            raise RuntimeError("the runner is closed")
        return self._compute

    def _check(self, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(f"{tokens} tokens do not fit a slot of {self.context}")


class _Tables:
    """The pool's block tables as the array that C reads; entries behind a slot's last block are any block."""

    def __init__(self, slots: int, context: int) -> None:
        self.array = np.zeros((slots, -(-context // BLOCK_TOKENS)), dtype=np.int32)
        self._counts = [0] * slots

    def update(self, slot: int, table: Sequence[int]) -> None:
        """Copies the blocks that were added since the last call or ``clear``."""
        before, now = self._counts[slot], len(table)
        if now > before:
            self.array[slot, before:now] = table[before:now]
            self._counts[slot] = now

    def clear(self, slot: int) -> None:
        self._counts[slot] = 0


def _fits_half(model: PreTrainedModel, spec: ModelSpec) -> bool:
    """float16 unless the weights are float32: beside the rounding of weights, its own is negligible."""
    if spec.kv_dtype != "auto":
        return spec.kv_dtype == "fp16"
    head = model.get_output_embeddings()
    linears = (m for m in model.modules() if isinstance(m, NativeLinear) and m is not head)
    return any(linear.kind != "float32" for linear in linears)
