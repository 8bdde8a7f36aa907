"""A ``transformers`` model as a step that LiteRT can compute: tokens and caches in, logits and new keys out.

The model's own forward pass runs with an attention function that reads the cache from the step's inputs. Keys
and values of the step's tokens are outputs: their caller keeps the cache, and nothing of it is copied. The
softmax is taken over cache and new tokens without joining them, so that no constant of the graph depends on
the cache's length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, Cache
from transformers.masking_utils import AttentionMaskInterface

ATTENTION = "litert_step"
"""``attn_implementation`` of the models that a ``Step`` wraps."""


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of one token in each layer, and the queries that share a head of them."""

    layers: int
    heads: int
    width: int
    queries: int


class StepCache(Cache):
    """The cache of one pass: past keys and values by row and layer; takes the new ones.

    Args:
        past: by row, the (keys, values) of each layer, each (heads, length, width).
        masks: by kind, for each row the (1, queries, length) mask of its past.
        own: by kind, the (1, queries, tokens) mask among the new tokens.
        kinds: by kind, the object that the model passes to attention for it.
    """

    def __init__(
        self,
        past: Sequence[Sequence[tuple[Tensor, Tensor]]],
        masks: Mapping[str, Sequence[Tensor]],
        own: Mapping[str, Tensor],
        kinds: Mapping[str, Tensor],
    ) -> None:
        super().__init__(layers=[])
        self.past, self.masks, self.own, self.kinds = past, masks, own, kinds
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.new[layer_idx] = key_states, value_states
        return key_states, value_states

    def kind_of(self, mask: Tensor | None) -> str:
        """The kind of attention of a layer, which got ``mask``."""
        return next((kind for kind, one in self.kinds.items() if one is mask), next(iter(self.kinds)))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


_current: list[StepCache] = []


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of (rows, heads, tokens, width) queries to each row's past and to its new tokens."""
    cache, scaling, softcap = _current[-1], options.get("scaling"), options.get("softcap")
    kind, (rows, _, tokens, width) = cache.kind_of(attention_mask), query.shape
    query = query * (width**-0.5 if scaling is None else scaling)
    found = []
    for row in range(rows):
        past_keys, past_values = cache.past[row][module.layer_idx]
        queries = query[row].reshape(key.shape[1], -1, width)  # those that share a head of keys together
        past = _capped(torch.bmm(queries, past_keys.transpose(1, 2)), softcap) + cache.masks[kind][row]
        own = _capped(torch.bmm(queries, key[row].transpose(1, 2)), softcap) + cache.own[kind]
        top = torch.maximum(past.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
        past, own = torch.exp(past - top), torch.exp(own - top)
        total = past.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
        mixed = torch.bmm(past, past_values) + torch.bmm(own, value[row])
        found.append((mixed / total).reshape(1, -1, tokens, width))
    joined = found[0] if rows == 1 else torch.cat(found)
    return joined.transpose(1, 2).contiguous(), None


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    """Gemma 2's scores before the softmax; a cap is far above most, so that leaving it out is hard to see."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, attention_mask=None, **__: attention_mask)


class Step(nn.Module):
    """One pass of ``rows`` sequences, each with its own cache, over ``tokens`` new tokens each."""

    def __init__(self, model: Any, shape: CacheShape, windows: Mapping[str, int | None], tokens: int) -> None:
        """``windows``: the attention window of each kind of layer; None: it attends to everything."""
        super().__init__()
        self.model, self._shape = model, shape
        self._scales = [
            name for name, one in model.named_parameters() if one.dim() == 1 and name.endswith("weight")
        ]
        self._own = {kind: own_mask(tokens, window, shape.queries) for kind, window in windows.items()}

    def forward(
        self,
        one: Tensor,
        tokens: Tensor,
        positions: Tensor,
        masks: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> dict[str, Tensor]:
        """Lists have the inputs of the first row before those of the second; ``masks`` by kind first.

        Args:
            one: (1,), the number 1. The scales of norms are multiplied by it: the converter would multiply
                constant ones into the matrices that follow, in some steps, which then share no weights.
            tokens, positions: (rows, tokens) int32.
            masks: (1, queries × tokens, length) each.
            keys, values: (heads, length, width) each.
        """
        rows, layers = len(tokens), self._shape.layers
        past = [
            list(zip(keys[at : at + layers], values[at : at + layers], strict=True))
            for at in range(0, rows * layers, layers)
        ]
        by_kind = {kind: masks[at * rows : (at + 1) * rows] for at, kind in enumerate(self._own)}
        kinds = {kind: own[None] for kind, own in self._own.items()}  # four dimensions: taken as they are
        cache = StepCache(past, by_kind, self._own, kinds)
        _current.append(cache)
        try:
            logits = functional_call(
                self.model,
                {name: self.model.get_parameter(name) * one for name in self._scales},
                kwargs={
                    "input_ids": tokens,
                    "position_ids": positions,
                    "attention_mask": kinds if len(kinds) > 1 else next(iter(kinds.values())),
                    "past_key_values": cache,
                    "use_cache": True,
                },
            ).logits
        finally:
            _current.pop()
        new = {f"new_keys_{layer}": pair[0] for layer, pair in cache.new.items()}
        new |= {f"new_values_{layer}": pair[1] for layer, pair in cache.new.items()}
        return {"logits": logits, **new}


def own_mask(tokens: int, window: int | None, queries: int) -> Tensor:
    """(1, queries × tokens, tokens): 0 where a new token attends to another, else the smallest number."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(tokens, tokens).masked_fill(hidden, torch.finfo(torch.float32).min)
    return mask.repeat(queries, 1)[None]


def inputs(shape: CacheShape, kinds: int, rows: int, tokens: int, length: int) -> dict[str, Any]:
    """Arguments of ``Step.forward``, all zeros."""
    past = [torch.zeros(shape.heads, length, shape.width) for _ in range(rows * shape.layers)]
    queries = 1 if tokens == 1 else shape.queries * tokens
    return {
        "one": torch.ones(1),
        "tokens": torch.zeros(rows, tokens, dtype=torch.int32),
        "positions": torch.zeros(rows, tokens, dtype=torch.int32),
        "masks": [torch.zeros(1, queries, length) for _ in range(rows * kinds)],
        "keys": past,
        "values": [one.clone() for one in past],
    }
