"""The Runner of a causal LM that can't be batched: each sequence in forward passes of its own.

For models whose rows would share what they must not: positions or masks derived from the length of the cache
(GPT-Neo's local attention, ALiBi), chunked attention, and state that is not keys and values per token (linear
attention, Mamba, short convolutions). The passes are those of ``transformers``' ``generate``, with its cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders.base import ModelSpec
from loaders.cuda.cuda_graphs import release_unused
from loaders.errors import CheckpointError
from loaders.layers.longrope import LongRope
from loaders.runner import Logits, Runner
from loaders.runners.sequence_cache import SequenceCache
from loaders.runners.slot_cache import cache_argument


class Form(NamedTuple):
    """How an architecture's forward pass continues a sequence."""

    positions: bool
    """Whether it needs ``position_ids``: Bamba counts from 0 in every pass without; RoBERTa, whose positions
    begin after its padding token's, derives other ones than ``generate`` passes."""
    continues: bool
    """Whether several tokens can follow a cached one in one pass: Mamba's recurrence begins anew in it."""


FORMS = (Form(False, True), Form(True, True), Form(False, False), Form(True, False))
"""In the order of preference."""


@dataclass
class _Slot:
    cache: SequenceCache
    cached: int = 0
    """Tokens in the cache."""
    waiting: list[int] = field(default_factory=list)
    """Tokens after them: of a prompt that is computed in one pass, when its last chunk has come."""
    computed: Tensor | None = None
    """Logits of a decode call that failed for another row."""
    failed: bool = False
    """Whether a pass failed: it may have changed the caches of some layers."""


class SequentialRunner(Runner):
    """Implements ``GrowingRunner`` and ``ReportingRunner`` as well."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, form: Form, why_not: str) -> None:
        """``model`` is in evaluation mode and on its device, or on several.

        Args:
            why_not: the reason why its rows can't be batched.

        Raises:
            CheckpointError: the model's forward pass takes no cache, or depends on the length of the text.
        """
        taken = signature(model.forward).parameters
        cache = cache_argument(model)
        if cache is None or (form.positions and "position_ids" not in taken):
            missing = "cache" if cache is None else "positions"
            raise CheckpointError(
                f"{spec.checkpoint.architecture} can't be served here: its forward pass takes no {missing}"
            )
        if LongRope.of(model, spec.slots, spec.max_tokens) is not None:
            raise CheckpointError(why_not)
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self.token_bytes, self.sequence_bytes = 0.0, 0
        self._model: PreTrainedModel | None = model
        self._form, self._cache_argument, self._selects = form, cache, "logits_to_keep" in taken
        self._slots: dict[int, _Slot] = {}
        self._name, self._why_not = f"transformers' {type(model).__name__}, one sequence at a time", why_not

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        held = self._held(slot, len(ids))
        if logits == "none":
            if self._form.continues:
                self._advance(held, ids, 1)
            else:
                held.waiting += ids
            return None
        if logits == "last" and not held.cached:
            ids, held.waiting = [*held.waiting, *ids], []
        return self._append(held, ids, len(ids) if logits == "all" else 1)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        rows = [self._held(slot, 1) for slot in slots]
        for held, id_ in zip(rows, ids, strict=True):
            if held.computed is None:
                held.computed = self._append(held, [id_], 1)
        found = [held.computed for held in rows if held.computed is not None]
        for held in rows:
            held.computed = None
        return torch.cat(found)

    @torch.inference_mode()
    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        self._check_fits(len(texts[0]))
        half = self._live.dtype == torch.float16  # whose overflows the cache finds
        return self._forward(texts, SequenceCache(self._live.config) if half else None, 0, kept)

    def free(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def close(self) -> None:
        device = self._live.device
        self._model = None
        self._slots.clear()
        if device.type == "cuda":
            release_unused()

    @property
    def kv_cache_bytes(self) -> int:
        return sum(held.cache.nbytes() for held in [*self._slots.values()])

    def report(self) -> Mapping[str, Any]:
        """For ``/stats``."""
        return {"forward": self._name, "slots": self.slots, "not_batched_because": self._why_not}

    @property
    def _live(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    def _held(self, slot: int, tokens: int) -> _Slot:
        """The slot's sequence, of which ``tokens`` more are to be computed."""
        if slot not in self._slots:
            self._slots[slot] = _Slot(SequenceCache(self._live.config))
        held = self._slots[slot]
        self._check_fits(held.cached + len(held.waiting) + tokens)
        return held

    def _append(self, held: _Slot, ids: Sequence[int], kept: int) -> Tensor:
        """(kept, vocabulary) logits."""
        if held.waiting:
            waiting, held.waiting = held.waiting, []
            self._append(held, waiting, 1)
        if self._form.continues or not held.cached:
            return self._advance(held, ids, kept)
        return torch.cat([self._advance(held, [id_], 1) for id_ in ids])[-kept:]

    def _advance(self, held: _Slot, ids: Sequence[int], kept: int) -> Tensor:
        """``_append`` in one pass."""
        if held.failed:
            raise RuntimeError("a forward pass of this sequence failed")
        held.failed = True
        found = self._forward([ids], held.cache, held.cached, kept)[0]
        if not held.cached:
            self.token_bytes, self.sequence_bytes = held.cache.sizes()
        held.cached += len(ids)
        held.failed = False
        return found

    def _forward(
        self, texts: Sequence[Sequence[int]], cache: SequenceCache | None, start: int, kept: int
    ) -> Tensor:
        """(texts, kept, vocabulary) logits of texts of equal length."""
        model, length = self._live, len(texts[0])
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            arguments[self._cache_argument] = cache
        if self._form.positions:
            arguments["position_ids"] = torch.arange(start, start + length, device=model.device)[None]
        if self._selects:
            arguments["logits_to_keep"] = kept
        logits: Tensor = model(input_ids=torch.tensor(texts, device=model.device), **arguments).logits
        return logits[:, -kept:].float()

    def _check_fits(self, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(f"{tokens} tokens do not fit a slot of {self.context}")
