"""The Runner of a .tflite file: steps of fixed sizes on caches that grow from one length to the next.

Rows are computed one after another, each with a cache of the length that its own tokens need, so that a row's
arithmetic doesn't depend on the rows beside it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.layers.layer_weights import LayerWeights
from loaders.litert.model import Array, StepCache, StepModel
from loaders.litert.steps import Signature
from loaders.runner import Logits, Runner

_HIDDEN = np.finfo(np.float32).min


class LiteRTRunner(Runner):
    """Implements ``ReportingRunner`` and ``DescribedLayers`` as well."""

    def __init__(
        self, model: StepModel, layers: Mapping[str, tuple[str, LayerWeights]], slots: int, context: int
    ) -> None:
        """``layers``: (kind, weights) of the model's layers by name."""
        self.slots, self.context = slots, context
        self.vocabulary = model.description.vocabulary
        self._model: StepModel | None = model
        self._layers = layers
        self._lengths = sorted({step.length for step in model.signatures})
        self._chunk = max(step.tokens for step in model.signatures)
        self._held = [0] * slots
        self._caches: dict[int, StepCache] = {}
        self._spare: dict[int, list[StepCache]] = defaultdict(list)

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        found = []
        for start in range(0, len(ids), self._chunk):
            chunk = ids[start : start + self._chunk]
            output = self._append(slot, chunk)
            self._held[slot] += len(chunk)
            if logits == "all" or start + len(chunk) == len(ids):
                found.append(output.copy())
        if logits == "none":
            return None
        return torch.from_numpy(np.concatenate(found) if logits == "all" else found[-1][-1:])

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        logits = np.empty((len(slots), self.vocabulary), np.float32)
        for row, (slot, id_) in enumerate(zip(slots, ids, strict=True)):
            logits[row] = self._append(slot, [id_])
        for slot in slots:  # after all: a failed call advances no row
            self._held[slot] += 1
        return torch.from_numpy(logits)

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        found = []
        for text in texts:
            if len(text) > self.context:
                raise ValueError(f"{len(text)} tokens do not fit a slot of {self.context}")
            self._held.append(0)  # a slot beyond the others, for this text
            try:
                logits = self.prefill(self.slots, text, "all")
                assert logits is not None
                found.append(logits[len(text) - kept :])
            finally:
                self.free(self.slots)
                self._held.pop()
        return torch.stack(found)

    def free(self, slot: int) -> None:
        if (cache := self._caches.pop(slot, None)) is not None:
            cache.clear(self._held[slot])
            self._spare[cache.length].append(cache)
        self._held[slot] = 0

    def close(self) -> None:
        self._model, self._layers = None, {}
        self._caches.clear()
        self._spare.clear()

    @property
    def kv_cache_bytes(self) -> int:
        caches = [*self._caches.values(), *(cache for spare in self._spare.values() for cache in spare)]
        return sum(cache.nbytes for cache in caches)

    def report(self) -> Mapping[str, Any]:
        """For ``/stats``."""
        return {
            "forward": "LiteRT's XNNPACK",
            "cache_lengths": self._lengths,
            "rows_of_a_step": 1,
            "chunk": self._chunk,
        }

    def layers(self) -> Mapping[str, tuple[str, LayerWeights]]:
        """(kind, weights) of the matrices in the file, by the names of the checkpoint's layers."""
        return self._layers

    @property
    def _live(self) -> StepModel:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    def _append(self, slot: int, ids: Sequence[int]) -> Array:
        """(len(ids), vocabulary) logits of a chunk that the slot doesn't count yet.

        The step's remaining tokens are padding after it.
        """
        cache, start = self._make_room(slot, len(ids)), self._held[slot]
        size = 1 if len(ids) == 1 else self._chunk
        tokens, positions = np.zeros((2, 1, size), np.int32)
        tokens[0, : len(ids)] = ids
        positions[0] = np.minimum(start + np.arange(size), self.context - 1)
        masks = [[mask] for mask in self._masks(start, size, cache.length)]
        output = self._live.run(Signature(1, size, cache.length), tokens, positions, masks, [cache])
        for held, new in zip((*cache.keys, *cache.values), (*output.keys, *output.values), strict=True):
            held[:, start : start + len(ids)] = new[0, :, : len(ids)]
        return output.logits[0, : len(ids)]

    def _masks(self, start: int, tokens: int, length: int) -> list[Array]:
        """By kind of layer, the (1, queries × tokens, length) mask of a past of ``start`` tokens."""
        columns, found = np.arange(length), []
        for window in self._live.description.windows.values():
            mask = np.zeros((tokens, length), np.float32)
            mask[:, start:] = _HIDDEN
            if window is not None:
                mask[columns <= start + np.arange(tokens)[:, None] - window] = _HIDDEN
            found.append(np.tile(mask, (1 if tokens == 1 else self._live.description.queries, 1))[None])
        return found

    def _make_room(self, slot: int, tokens: int) -> StepCache:
        """The slot's cache with room for more tokens: the next longer one if it has to grow.

        Raises:
            ValueError: they don't fit.
        """
        needed, cache = self._held[slot] + tokens, self._caches.get(slot)
        if needed > self.context:
            raise ValueError(f"{needed} tokens do not fit a slot of {self.context}")
        if cache is not None and needed <= cache.length:
            return cache
        length = next(length for length in self._lengths if length >= needed)
        spare = self._spare[length]
        longer = spare.pop() if spare else self._live.new_cache(length)
        if cache is not None:
            self._move(cache, longer, self._held[slot])
        self._caches[slot] = longer
        return longer

    def _move(self, cache: StepCache, longer: StepCache, tokens: int) -> None:
        for old, new in zip((*cache.keys, *cache.values), (*longer.keys, *longer.values), strict=True):
            new[:, :tokens] = old[:, :tokens]
        cache.clear(tokens)
        self._spare[cache.length].append(cache)
