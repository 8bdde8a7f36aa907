"""Forward passes that can be captured: tensors in, logits out, without reading their contents on the host.

There are two: a lean one of GPT-2, about eleven kernels per layer, and one that calls ``transformers``.
Both keep their state in a ``StaticCache``, whose ``begin`` is called before each pass.
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel, PreTrainedModel

from loaders.cuda.static_cache import ShapeProbe, StaticCache
from loaders.layers.attention_masks import Masks, additive

Keep = Literal["none", "all"] | Tensor
"""The tokens that get logits; a (1,) int64 tensor is the index of one."""


class Step(Protocol):
    """A model's forward pass."""

    name: str

    def __call__(
        self, ids: Tensor, positions: Tensor, columns: Tensor, cache: StaticCache | ShapeProbe, keep: Keep
    ) -> Tensor | None:
        """(rows, tokens or 1, vocabulary) logits, in the dtype of the head; None if none are kept.

        Args:
            ids: (rows, tokens), int64, as are ``positions``.
            columns: (visible,) 0, 1, 2 …, the columns of the cache that are attended to.
        """
        ...


def step_for(model: PreTrainedModel) -> Step:
    """The lean step if it supports the architecture, else ``transformers``' own.

    Raises:
        CheckpointError: neither supports it.
    """
    return LeanGPT2(model) if LeanGPT2.serves(model) else TransformersStep(model)


class LeanGPT2:
    """GPT-2 (Radford et al. 2019) over the model's own linear layers, quantized or not.

    ``transformers`` computes GELU's tanh form in eight kernels; here it is one kernel, and so is the store
    of keys and values.
    """

    name = "lean GPT-2"

    def __init__(self, model: Any) -> None:
        self._body, self._head = model.transformer, model.lm_head
        self._heads = model.config.n_head
        self._dtype: torch.dtype = self._body.wte.weight.dtype

    @staticmethod
    def serves(model: PreTrainedModel) -> bool:
        config = model.config
        return bool(
            type(model) is GPT2LMHeadModel
            and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
            and config.scale_attn_weights
            and not config.scale_attn_by_inverse_layer_idx
            and not config.reorder_and_upcast_attn
            and not config.add_cross_attention
        )

    def __call__(
        self, ids: Tensor, positions: Tensor, columns: Tensor, cache: StaticCache | ShapeProbe, keep: Keep
    ) -> Tensor | None:
        body = self._body
        mask = additive(positions, columns, self._dtype)
        hidden = body.wte(ids) + body.wpe(positions)
        for index, block in enumerate(body.h):
            hidden = hidden + self._attend(index, block.attn, block.ln_1(hidden), mask, cache)
            hidden = hidden + self._mlp(block.mlp, block.ln_2(hidden))
        if isinstance(keep, str):
            return None if keep == "none" else self._head(body.ln_f(hidden))
        return self._head(body.ln_f(hidden.index_select(1, keep)))  # type: ignore[no-any-return]

    def _attend(
        self, index: int, layer: Any, hidden: Tensor, mask: Tensor, cache: StaticCache | ShapeProbe
    ) -> Tensor:
        rows, tokens, width = hidden.shape
        states = layer.c_attn(hidden).view(rows * tokens, 3, self._heads, width // self._heads)
        query = states[:, 0].view(rows, tokens, self._heads, -1).transpose(1, 2)
        keys, values = cache.put(index, states[:, 1:])
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return layer.c_proj(found.transpose(1, 2).reshape(rows, tokens, width))  # type: ignore[no-any-return]

    def _mlp(self, layer: Any, hidden: Tensor) -> Tensor:
        return layer.c_proj(functional.gelu(layer.c_fc(hidden), approximate="tanh"))  # type: ignore[no-any-return]


class TransformersStep:
    """The forward pass of any ``transformers`` causal LM whose state is keys and values per token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = f"transformers' {type(model).__name__}"
        self._model: Any = model
        self._masks = Masks(model)

    def __call__(
        self, ids: Tensor, positions: Tensor, columns: Tensor, cache: StaticCache | ShapeProbe, keep: Keep
    ) -> Tensor | None:
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": self._masks.of(positions, columns, self._model.dtype),
            "past_key_values": cache,
            "use_cache": True,
        }
        if isinstance(keep, str) and keep == "none":
            self._model.base_model(**arguments)
            return None
        logits: Tensor = self._model(**arguments, logits_to_keep=0 if isinstance(keep, str) else keep).logits
        return logits
