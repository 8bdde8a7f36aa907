"""One step of a ``transformers`` causal LM, with its cache as plain tensors, in the form that is exported."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from loaders.errors import CheckpointError

ATTENTION = "GroupQueryAttention"
_IMPLEMENTATION = "bitdial_onnx"


def cache_shape(config: Any) -> tuple[int, int, int]:
    """(layers, key-value heads, head dim) of a model's cache."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    return text.num_hidden_layers, groups, getattr(text, "head_dim", None) or text.hidden_size // heads


class Step(nn.Module):
    """The model's forward pass; the arguments of ``forward`` are described in ``loaders.onnx.export``."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        AttentionInterface.register(_IMPLEMENTATION, self._attend)
        AttentionMaskInterface.register(_IMPLEMENTATION, lambda *_, **__: None)
        model.set_attn_implementation(_IMPLEMENTATION)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, last: Tensor, total: Tensor, kept: Tensor, past: Any
    ) -> dict[str, Any]:
        self._past, self._present, self._ends = past, list(past), (last, total)
        logits = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=_NewStates(),
            use_cache=True,
            logits_to_keep=kept,
        ).logits
        return {"logits": logits, "present": self._present}

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: object = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """An ``AttentionInterface`` function; states are (rows, heads, tokens, head dim)."""
        if s_aux is not None or value.shape[-1] != query.shape[-1]:
            raise CheckpointError("its attention has no form in ONNX Runtime's GroupQueryAttention")
        rows, heads, tokens, width = query.shape
        merged = [states.transpose(1, 2).reshape(rows, tokens, -1) for states in (query, key, value)]
        at = 2 * module.layer_idx
        keys, values = self._past[at : at + 2]
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "scale": float(width**-0.5 if scaling is None else scaling),
            "local_window_size": sliding_window or -1,
            "softcap": float(softcap or 0.0),
        }
        found, *self._present[at : at + 2] = torch.onnx.ops.symbolic_multi_out(
            f"com.microsoft::{ATTENTION}",
            [*merged, keys, values, *self._ends],
            attributes,
            dtypes=[query.dtype, keys.dtype, values.dtype],
            shapes=[merged[0].shape, keys.shape, values.shape],
            version=1,
        )
        return found.reshape(rows, tokens, heads, width), None


class _NewStates(Cache):
    """Hands the new keys and values on: the attention appends them itself."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0
