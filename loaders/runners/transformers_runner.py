"""The Runner of any ``transformers`` causal LM: the model's own forward pass over a slot cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders.base import ModelSpec
from loaders.cuda.cuda_graphs import release_unused
from loaders.errors import CheckpointError
from loaders.layers.attention_masks import Masks
from loaders.layers.longrope import LongRope
from loaders.runner import Logits, Runner
from loaders.runners.slot_cache import PassingCache, SlotCache, cache_argument

_RECOMPUTED = 512  # tokens per pass when a slot is computed again


class TransformersRunner(Runner):
    """Implements ``LengthRunner`` and ``ReportingRunner`` as well.

    Positions and masks are explicit, so rows don't affect each other.
    """

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, why_not: str | None = None) -> None:
        """``model`` is in evaluation mode and on its device, or on several.

        Args:
            why_not: the reason for this runner: why steps are not captured on a GPU, why the model isn't
                computed by the compiled forward pass on a CPU.

        Raises:
            CheckpointError: layers of different kinds have different original contexts, or the forward pass
                takes no cache.
        """
        if (argument := cache_argument(model)) is None:
            raise CheckpointError(f"{type(model).__name__}'s forward pass takes no cache")
        self._cache_argument = argument
        self._longrope = LongRope.of(model, spec.slots, spec.max_tokens)
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self._model: PreTrainedModel | None = model
        self._name = f"transformers' {type(model).__name__}"
        self._device, self._on_a_card = model.device, spec.device == "cuda"
        self._dtype = model.dtype
        self._cache = SlotCache(spec.slots, self.context)
        self._masks_of = Masks(model).of
        self._why_not = why_not

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        self._recompute_if_needed([slot], len(ids))
        return self._append(slot, ids, logits)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self._recompute_if_needed(slots, 1)
        self._enter(slots, 1)
        positions = torch.tensor([[self._cache.lengths[slot]] for slot in slots], device=self._device)
        tokens = torch.tensor(ids, device=self._device)[:, None]
        output = self._forward(tokens, positions, "all")
        self._commit(slots, [[id_] for id_ in ids])
        assert output is not None
        return output[:, 0].float()

    @torch.inference_mode()
    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        if len(texts[0]) > self.context:
            raise ValueError(f"{len(texts[0])} tokens do not fit a slot of {self.context}")
        if self._longrope is not None:
            self._longrope.enter_alone(len(texts[0]))
        ids = torch.tensor(texts, device=self._device)
        cache = PassingCache() if self._dtype == torch.float16 else None
        logits: Tensor = self._live(
            input_ids=ids, use_cache=False, logits_to_keep=kept, **{self._cache_argument: cache}
        ).logits
        return logits.float()

    @torch.inference_mode()
    def expect(self, slot: int, tokens: int) -> None:
        if self._longrope is not None and self._longrope.expect(slot, tokens):
            self._cache.lengths[slot] = 0

    @torch.inference_mode()
    def catch_up(self, slot: int, tokens: int) -> bool:
        if self._longrope is None:
            return True
        held = self._longrope.held(slot)
        self.expect(slot, len(held) + 1)
        start = self._cache.lengths[slot]
        if tokens and start < len(held):
            self._append(slot, held[start : start + tokens], "none", again=True)
        return self._cache.lengths[slot] == len(held)

    @torch.inference_mode()
    def free(self, slot: int) -> None:
        self._cache.clear(slot)
        if self._longrope is not None:
            self._longrope.clear(slot)

    def close(self) -> None:
        self._model = None
        self._cache.drop()
        if self._device.type == "cuda":
            release_unused()

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.nbytes()

    def report(self) -> Mapping[str, Any]:
        """For ``/stats``."""
        forward = {"forward": self._name}
        if not self._on_a_card:
            return {**forward, "not_compiled_because": self._why_not}
        return {**forward, "slots": self.slots, "captured": False, "not_captured_because": self._why_not}

    @property
    def module(self) -> PreTrainedModel:
        """The wrapped model."""
        return self._live

    @property
    def _live(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    def _recompute_if_needed(self, slots: Sequence[int], tokens: int) -> None:
        """Recomputes what the slots hold, if ``tokens`` more need other rotary frequencies."""
        if self._longrope is None:
            return
        for slot in slots:
            self.expect(slot, len(self._longrope.held(slot)) + tokens)
            while not self.catch_up(slot, _RECOMPUTED):
                pass

    def _append(self, slot: int, ids: Sequence[int], logits: Logits, again: bool = False) -> Tensor | None:
        start, count = self._cache.lengths[slot], len(ids)
        self._enter([slot], count)
        positions = torch.arange(start, start + count, device=self._device)[None]
        output = self._forward(torch.tensor([ids], device=self._device), positions, logits)
        self._commit([slot], [[] if again else ids], count)
        return None if output is None else output[0].float()

    def _enter(self, slots: Sequence[int], tokens: int) -> None:
        self._cache.enter(slots, tokens, self._device)
        if self._longrope is not None:
            self._longrope.enter(slots)

    def _commit(self, slots: Sequence[int], ids: Sequence[Sequence[int]], tokens: int = 1) -> None:
        self._cache.commit(slots, tokens)
        if self._longrope is not None:
            self._longrope.append(slots, ids)

    def _forward(self, ids: Tensor, positions: Tensor, logits: Logits) -> Tensor | None:
        """(rows, tokens or 1, vocabulary) logits of a pass over the entered slots."""
        columns = torch.arange(self._cache.end, dtype=torch.int64, device=self._device)
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": self._masks_of(positions, columns, self._dtype),
            self._cache_argument: self._cache,
            "use_cache": True,
        }
        if logits == "none":  # without the head, which is the largest matrix of a small model
            self._live.base_model(**arguments)
            return None
        output: Tensor = self._live(**arguments, logits_to_keep=1 if logits == "last" else 0).logits
        return output
