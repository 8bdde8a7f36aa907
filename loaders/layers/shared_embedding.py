"""Token embeddings looked up in the int8 weights of the output head that they are tied to: one copy."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loaders.layers.dequantize import dequantize_int8
from loaders.layers.layer_weights import LayerWeights
from loaders.layers.native_linear import NativeLinear


class SharedEmbedding(nn.Module):
    """Rows of a head's matrix. It has no tensors of its own.

    Args:
        head: int8; factors that its weights include (``input_scale``) are divided out.
        dtype: of the embeddings, as of the model's norms.
    """

    def __init__(self, head: NativeLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._head = (head,)  # in a tuple: a submodule would be counted and saved twice

    @property
    def head(self) -> NativeLinear:
        return self._head[0]

    def forward(self, ids: Tensor) -> Tensor:
        head = self.head
        assert head.scales is not None
        rows = dequantize_int8(head.weight[ids.flatten()], head.scales[ids.flatten()])
        if head.input_scale is not None:
            rows = rows / head.input_scale
        return rows.view(*ids.shape, head.in_features).to(self._dtype)

    def layer_weights(self) -> LayerWeights:
        return self.head.layer_weights()


def share_embedding(model: PreTrainedModel) -> bool:
    """Replaces the token embedding by lookups in the head, if that is int8 on the kernels.

    The caller has made the head from weights that were tied to the embedding.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if not isinstance(head, NativeLinear) or head.kind != "int8" or type(embedding) is not nn.Embedding:
        return False
    if embedding.weight.shape != (head.out_features, head.in_features):
        return False
    name = next(name for name, module in model.named_modules() if module is embedding)
    model.set_submodule(name, SharedEmbedding(head, embedding.weight.dtype))
    return True


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head multiplies with the token embeddings, and both are modules of plain weights."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return type(head) is nn.Linear and type(embedding) is nn.Embedding and head.weight is embedding.weight


def stays_beside(model: PreTrainedModel, int8: bool) -> bool:
    """Whether a tied embedding is kept beside a head that gets weights of its own.

    Args:
        int8: the head's weights are int8 on the kernels.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head.weight is embedding.weight and not (int8 and is_tied(model))
