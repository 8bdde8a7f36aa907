"""The Runner of every ``transformers`` causal LM: its own forward pass over a slot cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders.base import Logits, ModelSpec
from loaders.cuda_graphs import release_unused
from loaders.masks import Masks
from loaders.slot_cache import SlotCache


class TorchRunner:
    """Implements ``loaders.base.Runner``; positions and masks are explicit, so rows never see each other."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, why_not: str | None = None) -> None:
        """``model`` is in evaluation mode and on its device, or on several.

        Args:
            why_not: on a GPU, what keeps its steps from being captured.

        Raises:
            CheckpointError: the architecture keeps other state than keys and values per token.
        """
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self._model: PreTrainedModel | None = model
        self._device = model.device
        self._dtype = model.dtype
        self._cache = SlotCache(spec.slots, self.context)
        self._masks_of = Masks(model).of
        self._why_not = why_not

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        start, count = self._cache.lengths[slot], len(ids)
        self._cache.enter([slot], count, self._device)
        positions = torch.arange(start, start + count, device=self._device)[None]
        output = self._forward(torch.tensor([ids], device=self._device), positions, logits)
        self._cache.commit([slot], count)
        return None if output is None else output[0].float()

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self._cache.enter(slots, 1, self._device)
        positions = torch.tensor([[self._cache.lengths[slot]] for slot in slots], device=self._device)
        tokens = torch.tensor(ids, device=self._device)[:, None]
        output = self._forward(tokens, positions, "all")
        self._cache.commit(slots, 1)
        assert output is not None
        return output[:, 0].float()

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._live(
            input_ids=torch.tensor([ids], device=self._device), use_cache=False
        ).logits
        return logits[0].float()

    @torch.inference_mode()
    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        ids = torch.tensor(texts, device=self._device)
        logits: Tensor = self._live(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        return logits.float()

    @torch.inference_mode()
    def free(self, slot: int) -> None:
        self._cache.clear(slot)

    def close(self) -> None:
        self._model = None
        self._cache.drop()
        if self._device.type == "cuda":
            release_unused()

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.nbytes()

    def report(self) -> Mapping[str, Any]:
        """What ``/stats`` shows of it; on a CPU nothing is ever captured, and nothing is said of it."""
        if self._why_not is None:
            return {}
        return {"slots": self.slots, "captured": False, "not_captured_because": self._why_not}

    @property
    def module(self) -> PreTrainedModel:
        """The model below, for who looks at its weights."""
        return self._live

    @property
    def _live(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    def _forward(self, ids: Tensor, positions: Tensor, logits: Logits) -> Tensor | None:
        """(rows, tokens or 1, vocabulary) logits of a pass over the slots that the cache was told of."""
        columns = torch.arange(self._cache.end, dtype=torch.int64, device=self._device)
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": self._masks_of(positions, columns, self._dtype),
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if logits == "none":  # the body alone: the head is the largest matrix of a small model
            self._live.base_model(**arguments)
            return None
        output: Tensor = self._live(**arguments, logits_to_keep=1 if logits == "last" else 0).logits
        return output
