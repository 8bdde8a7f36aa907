"""The Runner of GPT-2 on a CPU: a step is one call into C; ``transformers``' forward makes a thousand calls.

Every token is a row: (slot, position, id). Prompt chunks and decode steps are the same computation on
    different rows, and each row's result depends on its past alone; so neither the batch nor the chunks of
    a prompt change a bit of it. Tests compare it with ``transformers``' forward.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from loaders import kernels
from loaders.base import ModelSpec
from loaders.layers.native_linear import NativeLinear
from loaders.runner import Logits, Runner

_log = logging.getLogger(__name__)


def serves(config: Any) -> bool:
    """Whether the configuration is a standard GPT-2 of a shape that the kernels support."""
    return bool(
        config.model_type == "gpt2"
        and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.add_cross_attention
        and config.n_embd % 32 == 0
        and (config.n_embd // config.n_head) % 8 == 0
    )


def supports(model: PreTrainedModel) -> bool:
    """Whether ``serves`` accepts the model and every linear layer is on the compiled kernels."""
    if type(model) is not GPT2LMHeadModel or not serves(model.config):
        return False
    layers = [m for block in model.transformer.h for m in _linears(block)]
    return all(isinstance(m, NativeLinear) for m in (*layers, model.lm_head))


def _linears(block: Any) -> tuple[Any, Any, Any, Any]:
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def _cache_type(model: GPT2LMHeadModel, spec: ModelSpec) -> type[np.floating[Any]]:
    """float16 unless the weights are float32: beside the rounding of weights, its own is negligible."""
    if spec.kv_dtype != "auto":
        return np.float16 if spec.kv_dtype == "fp16" else np.float32
    exact = all(linear.kind == "float32" for block in model.transformer.h for linear in _linears(block))
    return np.float32 if exact else np.float16


def _pages(shape: tuple[int, ...], kind: type[np.floating[Any]]) -> Tensor:
    """Zeros from calloc: pages are committed when written; torch.zeros would write all of them."""
    return torch.from_numpy(np.zeros(math.prod(shape), kind)).view(shape)


def _pack(model: Any) -> kernels.GPT2:
    library, body = kernels.get(), model.transformer
    assert library is not None
    layers = []
    for block in body.h:
        qkv, attention_out, up, down = (linear.matrix for linear in _linears(block))
        layers.append(kernels.Layer(_norm(block.ln_1), qkv, attention_out, _norm(block.ln_2), up, down))
    return kernels.GPT2(
        library,
        model.config.n_head,
        model.config.layer_norm_epsilon,
        body.wte.weight.detach(),
        body.wpe.weight.detach(),
        layers,
        _norm(body.ln_f),
        model.lm_head.matrix,
    )


def _norm(layer: Any) -> kernels.Norm:
    return kernels.Norm(layer.weight.detach(), layer.bias.detach())


class GPT2CPURunner(Runner):
    """The runner of a model that ``supports`` accepts; implements ``MixedRunner`` as well.

    If keys or values don't fit into float16, the cache becomes float32 and the pass is computed again. What
    does fit stays rounded to float16, so that no bit changes for other sequences.
    """

    def __init__(self, model: GPT2LMHeadModel, spec: ModelSpec) -> None:
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self._model: GPT2LMHeadModel | None = model  # None once closed, like _compute
        self._compute: kernels.GPT2 | None = _pack(model)
        self._config: Any = model.config
        self._lengths = [0] * spec.slots
        self._cache_type = _cache_type(model, spec)
        self._widened = False
        self._cache = self._key_values(spec.slots, self.context)

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        start, count = self._lengths[slot], len(ids)
        self._check(start + count)
        wanted = {"none": 0, "last": 1, "all": count}[logits]
        found = self._pass([slot] * count, range(start, start + count), ids, wanted)
        self._lengths[slot] += count
        return found if wanted else None

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        positions = [self._lengths[slot] for slot in slots]
        self._check(max(positions) + 1)
        logits = self._pass(slots, positions, ids, len(ids))
        for slot in slots:
            self._lengths[slot] += 1
        return logits

    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        start, count = self._lengths[slot], len(ids)
        following = [self._lengths[other] for other in slots]
        self._check(max(start + count, *(position + 1 for position in following)))
        positions = [*range(start, start + count), *following]
        where = [*[slot] * count, *slots]
        logits = self._pass(where, positions, [*ids, *next_ids], 1 + len(slots))
        self._lengths[slot] += count
        for other in slots:
            self._lengths[other] += 1
        return logits

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        self._check(len(texts[0]))
        return self._widening(lambda: self._scored(texts, kept))

    def _scored(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        count, length = len(texts), len(texts[0])
        alone, skipped = self._key_values(count, length), length - kept
        if skipped:  # a separate pass, since in a pass the rows without logits come first
            self._chunks(alone, texts, 0, skipped, wanted=0)
        logits = self._chunks(alone, texts, skipped, length, wanted=count * kept)
        return logits.view(count, kept, self.vocabulary)

    def _chunks(
        self, cache: kernels.KeyValues, texts: Sequence[Sequence[int]], start: int, end: int, wanted: int
    ) -> Tensor:
        """Computes the same chunk of every text; text i is in slot i."""
        slots = [slot for slot in range(len(texts)) for _ in range(start, end)]
        ids = [id_ for text in texts for id_ in text[start:end]]
        return self._live(cache, slots, [*range(start, end)] * len(texts), ids, wanted)

    def free(self, slot: int) -> None:
        self._lengths[slot] = 0  # a row attends only to what its own sequence wrote

    def close(self) -> None:
        self._model = self._compute = None
        self._cache = kernels.KeyValues([])

    def report(self) -> Mapping[str, Any]:
        """For ``/stats``."""
        kind = np.dtype(self._cache_type).name
        return {"kv_cache_dtype": f"{kind}, since float16 did not hold it" if self._widened else kind}

    @property
    def module(self) -> GPT2LMHeadModel:
        """The model with the weights."""
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    @property
    def kv_cache_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._cache.layers for tensor in pair)

    def _pass(
        self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int], wanted: int
    ) -> Tensor:
        """A pass over the slots, which doesn't update ``_lengths``."""
        return self._widening(lambda: self._live(self._cache, slots, positions, ids, wanted))

    def _widening(self, compute: Callable[[], Tensor]) -> Tensor:
        try:
            return compute()
        except kernels.BeyondHalf:
            self._widen()
            return compute()

    def _widen(self) -> None:
        """Replaces the cache by one in float32 with the same contents and twice the memory."""
        _log.warning("keys or values do not fit into float16: the KV cache is float32 from now on")
        narrow, before = self._cache.layers, self._cache_type
        self._cache_type, self._widened = np.float32, True
        try:
            self._cache = self._key_values(self.slots, self.context)
        except MemoryError:
            self._cache_type, self._widened = before, False
            raise
        for old, new in zip(narrow, self._cache.layers, strict=True):
            for slot, length in enumerate(self._lengths):
                for source, target in zip(old, new, strict=True):
                    target[slot, :, :length] = source[slot, :, :length]

    def _key_values(self, slots: int, context: int) -> kernels.KeyValues:
        config = self._config
        shape = (slots, config.n_head, context, config.n_embd // config.n_head)
        pairs = [
            (_pages(shape, self._cache_type), _pages(shape, self._cache_type)) for _ in range(config.n_layer)
        ]
        return kernels.KeyValues(pairs, rounded=self._widened)

    @property
    def _live(self) -> kernels.GPT2:
        if self._compute is None:
            raise RuntimeError("the runner is closed")
        return self._compute

    def _check(self, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(f"{tokens} tokens do not fit a slot of {self.context}")
