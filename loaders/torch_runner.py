"""The Runner of every ``transformers`` causal LM: its own forward pass over a slot cache."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders.base import CheckpointError, Logits, ModelSpec
from loaders.slot_cache import SlotCache

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


class TorchRunner:
    """Implements ``loaders.base.Runner``; positions and masks are explicit, so rows never see each other."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        """``model`` is in evaluation mode and on its device.

        Raises:
            CheckpointError: the architecture keeps other state than keys and values per token.
        """
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self._model: PreTrainedModel | None = model
        self._device = model.device
        self._dtype = model.dtype
        self._cache = SlotCache(spec.slots, self.context)
        config = model.config.get_text_config()
        self._window: int | None = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        self._types = set(types or ())
        if unknown := self._types - _ATTENTION_TYPES:
            raise CheckpointError(
                f"{type(model).__name__} has {', '.join(sorted(unknown))} layers; only models whose state is "
                "keys and values per token can be batched here"
            )

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
    def free(self, slot: int) -> None:
        self._cache.clear(slot)

    def close(self) -> None:
        self._model = None
        self._cache.drop()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def kv_cache_bytes(self) -> int:
        return self._cache.nbytes()

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
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": self._masks(positions),
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if logits == "none":  # the body alone: the head is the largest matrix of a small model
            self._live.base_model(**arguments)
            return None
        output: Tensor = self._live(**arguments, logits_to_keep=1 if logits == "last" else 0).logits
        return output

    def _masks(self, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks (rows, 1, tokens, keys), per attention type where the model mixes several."""
        full = self._mask(positions, None)
        if self._window is None or (self._types and "sliding_attention" not in self._types):
            return full
        sliding = self._mask(positions, self._window)
        if len(self._types) < 2:
            return sliding
        return {"full_attention": full, "sliding_attention": sliding}

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        """Position p sees the keys at p − window + 1 … p."""
        keys = torch.arange(self._cache.end, device=self._device)
        hidden = keys > positions[..., None]
        if window is not None:
            hidden |= keys <= positions[..., None] - window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)[:, None]
