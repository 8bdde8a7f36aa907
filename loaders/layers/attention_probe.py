"""What a model's layers give to attention, found by a pass without weights."""

import json
from collections.abc import Sequence
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from loaders.config_check import meta_model_of

_IMPLEMENTATION = "bitdial_probe"
_TOKENS = 2


@dataclass(frozen=True)
class AttentionCall:
    """One call through ``transformers``' attention interface: the width of a head's keys and values."""

    keys: int
    values: int
    sinks: bool


_calls: ContextVar[list[AttentionCall]] = ContextVar("calls")
_found: dict[str, list[AttentionCall] | None] = {}  # by configuration


def attention_calls(config: Any) -> list[AttentionCall] | None:
    """The calls of one pass; fewer than layers, where some compute attention in their own code.

    None if the pass raises, as one that reads values must.

    Args:
        config: the ``transformers`` configuration.
    """
    key = f"{type(config).__name__} {json.dumps(config.to_dict(), sort_keys=True, default=repr)}"
    if key not in _found:
        _found[key] = _probe(config)
    return _found[key]


def outside_interface(calls: Sequence[AttentionCall], layers: int) -> str | None:
    """The reason that another attention can't be set in all layers; None if it can."""
    if len(calls) == layers:
        return None
    return f"{len(calls)} of its {layers} layers compute attention through transformers' interface for it"


def _probe(config: Any) -> list[AttentionCall] | None:
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
    rows, heads, tokens, _ = query.shape
    _calls.get().append(AttentionCall(key.shape[-1], value.shape[-1], options.get("s_aux") is not None))
    return query.new_empty(rows, tokens, heads, value.shape[-1]), None


AttentionInterface.register(_IMPLEMENTATION, _attend)
AttentionMaskInterface.register(_IMPLEMENTATION, lambda *_, **__: None)
