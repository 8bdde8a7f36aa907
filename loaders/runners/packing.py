"""A loaded ``transformers`` model as the compiled forward pass expects it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders import kernels
from loaders.architectures import Architecture, UnsupportedArchitecture
from loaders.kernels import Decoder, Layer, Norm, PackedMatrix
from loaders.layers.native_linear import NativeLinear
from loaders.layers.shared_embedding import SharedEmbedding

_MOST_POSITIONS = 2**22


def pack(
    model: PreTrainedModel, architecture: Architecture, context: int, library: kernels.Library | None = None
) -> Decoder:
    """Refers to the model's weights, without a copy.

    Args:
        context: longest sequence, for rotary positions.
        library: computes; None: this CPU's best.

    Raises:
        UnsupportedArchitecture: the model is not of the architecture's class, or a layer is not on the
            compiled kernels.
    """
    if type(model).__name__ != architecture.model_class:
        raise UnsupportedArchitecture(f"{type(model).__name__} is not {architecture.model_class}")
    library = library or kernels.get()
    if library is None:
        raise UnsupportedArchitecture(f"there are no compiled kernels here: {kernels.find()}")
    positions, rotary = architecture.positions, architecture.rotary
    try:
        return Decoder(
            library,
            architecture.shape,
            *_tokens(model, architecture.tokens),
            None if positions is None else _parameter(model, positions)[architecture.first_position :],
            None if rotary is None else angles(model.get_submodule(rotary), context),
            layers_of(model, architecture),
            _norm(model, architecture.last, architecture.norm_offset),
            _matrix(model, architecture.head),
        )
    except (ValueError, AttributeError) as error:  # shapes or modules that the configuration doesn't show
        raise UnsupportedArchitecture(str(error)) from error


def layers_of(model: PreTrainedModel, architecture: Architecture) -> list[Layer]:
    names, offset = architecture.block, architecture.norm_offset
    return [
        Layer(
            before_attention=_norm(block, names.before_attention, offset),
            qkv=[_matrix(block, name) for name in names.qkv],
            attention_out=_matrix(block, names.attention_out),
            before_mlp=_norm(block, names.before_mlp, offset),
            mlp_in=[_matrix(block, name) for name in names.mlp_in],
            down=_matrix(block, names.down),
            query=None if names.query_norm is None else _norm(block, names.query_norm, offset),
            key=None if names.key_norm is None else _norm(block, names.key_norm, offset),
            window=window,
        )
        for block, window in zip(model.get_submodule(architecture.blocks), architecture.windows, strict=True)
    ]


def angles(rotary: Any, count: int) -> Tensor:
    """(count, 2 · pairs) cosines and sines of each position, as the model's own module computes them.

    Raises:
        MemoryError: for more positions than any model has; the system would end the process.
    """
    if count > _MOST_POSITIONS:
        raise MemoryError(f"rotary positions for {count} tokens")
    cosines, sines = rotary(torch.zeros(1), torch.arange(count)[None])
    pairs = cosines.shape[-1] // 2
    return torch.cat([cosines[0, :, :pairs], sines[0, :, :pairs]], dim=1).contiguous()


def _parameter(module: Any, name: str) -> Tensor:
    weight: Tensor = module.get_submodule(name).weight.detach()
    return weight


def _tokens(module: Any, name: str) -> tuple[Tensor | PackedMatrix, Tensor | None]:
    """The embeddings, and factors of their channels."""
    embedding = module.get_submodule(name)
    if not isinstance(embedding, SharedEmbedding):
        return _parameter(module, name), None
    scale = embedding.head.input_scale
    return embedding.head.matrix, None if scale is None else 1 / scale


def _norm(module: Any, name: str, offset: float) -> Norm:
    norm = module.get_submodule(name)
    weight, bias = norm.weight.detach(), getattr(norm, "bias", None)
    return Norm(weight.float() + offset if offset else weight, None if bias is None else bias.detach())


def _matrix(module: Any, name: str) -> PackedMatrix:
    linear = module.get_submodule(name)
    if not isinstance(linear, NativeLinear):
        raise UnsupportedArchitecture(f"{name} is not on the compiled kernels: {type(linear).__name__}")
    return linear.matrix
