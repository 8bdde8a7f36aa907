"""Whether a model's attention can be replaced by ONNX Runtime's, found by a pass without weights."""

import json
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from loaders.config_check import meta_model_of
from loaders.onnx.step import cache_shape

_IMPLEMENTATION = "bitdial_onnx_probe"
_TOKENS = 2
_HEAD_WIDTH = 8
_calls: ContextVar[list[bool]] = ContextVar("calls")
"""For each call of attention in this pass, whether GroupQueryAttention has a form for it."""
_found: dict[str, str | None] = {}  # by configuration


def attention_refusal(config: Any) -> str | None:
    """Why it can't; None if it can, or if no pass without weights is possible: then exporting tells.

    Args:
        config: the ``transformers`` configuration.
    """
    layers, _, width = cache_shape(config)
    if width % _HEAD_WIDTH:
        return f"its attention heads are {width} wide; ONNX Runtime takes multiples of {_HEAD_WIDTH}"
    key = f"{type(config).__name__} {json.dumps(config.to_dict(), sort_keys=True, default=repr)}"
    if key not in _found:
        _found[key] = _reason(_probe(config), layers)
    return _found[key]


def _reason(calls: list[bool] | None, layers: int) -> str | None:
    if calls is None:
        return None
    if len(calls) != layers:
        return f"{len(calls)} of its {layers} layers compute attention through transformers' interface for it"
    return None if all(calls) else "its attention has no form in ONNX Runtime's GroupQueryAttention"


def _probe(config: Any) -> list[bool] | None:
    """The calls of attention; None if the pass raises, as one that reads values must."""
    model = meta_model_of(deepcopy(config))  # the attention is set in a model's configuration
    model.set_attn_implementation(_IMPLEMENTATION)
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    masks = torch.zeros(1, 1, _TOKENS, _TOKENS, device="meta"), None  # some architectures take only one
    for mask in masks:
        token = _calls.set([])
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            return _calls.get()
        except Exception:  # of any class: whatever the pass of an unknown model meets
            continue
        finally:
            _calls.reset(token)
    return None


def _attend(
    module: object, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **options: Any
) -> tuple[Tensor, None]:
    """An ``AttentionInterface`` function; states are (rows, heads, tokens, head dim)."""
    rows, heads, tokens, width = query.shape
    _calls.get().append(options.get("s_aux") is None and value.shape[-1] == width)
    return query.new_empty(rows, tokens, heads, value.shape[-1]), None


AttentionInterface.register(_IMPLEMENTATION, _attend)
AttentionMaskInterface.register(_IMPLEMENTATION, lambda *_, **__: None)
