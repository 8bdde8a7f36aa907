"""The output head of a four-bit model on a CPU: in a type of its own."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loaders import kernels
from loaders.base import DTYPES, ModelSpec
from loaders.layers.dynamic_int8_linear import int8_linear, int8_linear_bytes
from loaders.layers.huge_pages import Arena
from loaders.layers.native_linear import FORMATS, NativeLinear
from loaders.layers.shared_embedding import is_tied, share_embedding, stays_beside


def head_type(precision: str, spec: ModelSpec, model: PreTrainedModel, rest: torch.dtype) -> torch.dtype:
    """The type of the output head: another than the rest's only at four bits on the compiled CPU kernels.

    There int8 is the default: the head is most of a small model's memory traffic, and in int8 it costs less
    than a hundredth of the quality that four bits in the other layers do.
    """
    head = model.get_output_embeddings()
    if precision == "int8" or spec.device != "cpu" or type(head) is not nn.Linear:
        return rest
    wanted = spec.lm_head_dtype
    kind = "int8" if wanted in ("auto", "int8") else FORMATS[DTYPES[wanted]]
    if not kernels.supports(kind, head.in_features):
        return rest
    return torch.int8 if kind == "int8" else DTYPES[wanted]


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    weight: torch.Tensor = model.get_output_embeddings().weight.detach()
    return weight


def replace_head(model: PreTrainedModel, weight: torch.Tensor, dtype: torch.dtype, arena: Arena) -> None:
    """Gives the head those weights in that type; a tied embedding is looked up in them if they are int8."""
    head: Any = model.get_output_embeddings()
    tied = is_tied(model)
    name = next(name for name, module in model.named_modules() if module is head)
    bias = head.bias
    if dtype == torch.int8:
        model.set_submodule(name, int8_linear(weight, bias, arena))
        if tied:
            share_embedding(model)
    else:
        model.set_submodule(name, NativeLinear(FORMATS[dtype], weight.to(dtype), bias, arena=arena))


def own_head_bytes(model: PreTrainedModel, kept: torch.dtype, own: torch.dtype) -> int:
    """What a head of another type adds: all of it if an embedding that it was tied to is kept beside it."""
    weight: Any = model.get_output_embeddings().weight
    outputs, inputs = weight.shape
    size = int8_linear_bytes(outputs, inputs) if own == torch.int8 else weight.numel() * own.itemsize
    return size - (0 if stays_beside(model, own == torch.int8) else weight.numel() * kept.itemsize)
