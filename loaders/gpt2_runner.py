"""The Runner of GPT-2 on a CPU: a step of some hundred calls; ``transformers``' forward makes a thousand.

Every token is a row: (slot, position, id). Prompt chunks and decode steps are the same computation on other
rows, and each row's result depends on that row's past alone; so neither batch-mates nor the way a prompt is
cut change a bit of it. ``transformers``' forward is the reference that it is tested against.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from loaders import kernels
from loaders.base import Logits, ModelSpec
from loaders.native_linear import NativeLinear


def supports(model: PreTrainedModel) -> bool:
    """Whether this is a GPT-2 as its paper has it, with every linear layer on the compiled kernels."""
    if type(model) is not GPT2LMHeadModel:
        return False
    config: Any = model.config
    plain = (
        config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.add_cross_attention
        and (config.n_embd // config.n_head) % 8 == 0
    )
    layers = [m for block in model.transformer.h for m in _linears(block)]
    return bool(plain) and all(isinstance(m, NativeLinear) for m in (*layers, model.lm_head))


def _linears(block: Any) -> tuple[Any, Any, Any, Any]:
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


class KeyValues:
    """Keys and values of every layer: (slots, heads, context, dim) float32 each."""

    def __init__(self, config: Any, slots: int, context: int) -> None:
        shape = (slots, config.n_head, context, config.n_embd // config.n_head)
        self.layers = [(_pages(shape), _pages(shape)) for _ in range(config.n_layer)]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)


def _pages(shape: tuple[int, ...]) -> Tensor:
    """calloc: zero pages that take no memory until they are written, which torch.zeros would do at once."""
    return torch.from_numpy(np.zeros(math.prod(shape), np.float32)).view(shape)


class GPT2Runner:
    """Implements ``loaders.base.Runner`` for a model that ``supports`` accepts."""

    def __init__(self, model: GPT2LMHeadModel, spec: ModelSpec) -> None:
        self.slots, self.context = spec.slots, spec.max_tokens
        self.vocabulary = spec.checkpoint.vocabulary
        self._model: Any = model  # None once closed
        self._config: Any = model.config
        self._lengths = [0] * spec.slots
        self._cache: KeyValues | None = KeyValues(model.config, spec.slots, self.context)

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        start, count = self._lengths[slot], len(ids)
        positions = range(start, start + count)
        self._check(start + count)
        hidden = self._body(self._live_cache, [slot] * count, positions, ids)
        self._lengths[slot] += count
        if logits == "none":
            return None
        return self._head(hidden[-1:] if logits == "last" else hidden)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        positions = [self._lengths[slot] for slot in slots]
        self._check(max(positions) + 1)
        logits = self._head(self._body(self._live_cache, slots, positions, ids))
        for slot in slots:
            self._lengths[slot] += 1
        return logits

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> Tensor:
        self._check(len(ids))
        alone = KeyValues(self._config, 1, len(ids))
        return self._head(self._body(alone, [0] * len(ids), range(len(ids)), ids))

    def free(self, slot: int) -> None:
        self._lengths[slot] = 0  # a row never looks beyond what its own sequence wrote

    def close(self) -> None:
        self._model = self._cache = None

    @property
    def kv_cache_bytes(self) -> int:
        return 0 if self._cache is None else self._cache.nbytes()

    @property
    def module(self) -> PreTrainedModel:
        """The model below, for who looks at its weights."""
        model: PreTrainedModel = self._live
        return model

    @property
    def _live(self) -> Any:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    @property
    def _live_cache(self) -> KeyValues:
        if self._cache is None:
            raise RuntimeError("the runner is closed")
        return self._cache

    def _check(self, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(f"{tokens} tokens do not fit a slot of {self.context}")

    def _body(
        self, cache: KeyValues, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int]
    ) -> Tensor:
        """The (rows, width) hidden states after the last block; rows of one slot in rising positions."""
        library = kernels.get()
        assert library is not None
        where, when = torch.tensor(slots), torch.tensor(positions)
        body = self._live.transformer
        x: Tensor = body.wte.weight[torch.tensor(ids)].float() + body.wpe.weight[when].float()
        for block, (keys, values) in zip(body.h, cache.layers, strict=True):
            qkv, attention_out, up, down = _linears(block)
            attended = kernels.attend(qkv.rows(_norm(block.ln_1, x)), keys, values, where, when, library)
            x = attention_out.rows(attended, residual=x)
            inner = functional.gelu(up.rows(_norm(block.ln_2, x)), approximate="tanh")
            x = down.rows(inner, residual=x)
        return x

    def _head(self, hidden: Tensor) -> Tensor:
        model = self._live
        logits: Tensor = model.lm_head.rows(_norm(model.transformer.ln_f, hidden))
        return logits


def _norm(layer: Any, x: Tensor) -> Tensor:
    weight, bias = layer.weight.float(), layer.bias.float()  # no copy where they are float32
    normed: Tensor = functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return normed
