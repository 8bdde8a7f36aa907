"""A saved checkpoint on the compiled kernels as a model in float32, for programs that know no other."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.artifacts.native_weights import empty_model, load_native
from loaders.artifacts.prepare import prepare
from loaders.base import ModelSpec, Progress, Recipe
from loaders.errors import CheckpointError
from loaders.layers.layer_weights import weights_of
from loaders.layers.native_linear import NativeLinear
from loaders.layers.shared_embedding import SharedEmbedding


class Dequantized(NamedTuple):
    """A model whose weights are the values that codes and scales represent.

    Args:
        model: in float32. Its head is tied to its embedding if both have the same values.
        codes: int8 (outputs, inputs), by layer; of the layers whose weights have one scale for each output.
        scales: (outputs,) float32, of the same layers.
    """

    model: PreTrainedModel
    codes: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]


def dequantized(spec: ModelSpec, progress: Progress) -> Dequantized:
    """The model of a checkpoint that is saved in a precision of the compiled kernels.

    Raises:
        CheckpointError: its files are damaged, or this host has no compiled kernels.
    """
    saved, name = spec.checkpoint.saved, spec.checkpoint.model_id
    assert saved is not None
    if kernels.get() is None:
        raise CheckpointError(f"{name} can't be read without the compiled kernels: {kernels.find()}")
    native = load_native(spec, prepare(spec, Recipe(saved, {}), None, progress), progress)
    matrices = {at: found for at, one in native.named_modules() if (found := _matrix(one)) is not None}
    config = deepcopy(spec.checkpoint.config)
    if config.tie_word_embeddings:  # a head that includes the factors of folded norms is not its embedding
        names = {one: at for at, one in native.named_modules()}
        ends = [
            matrices[names[end]] for end in (native.get_output_embeddings(), native.get_input_embeddings())
        ]
        config.tie_word_embeddings = torch.equal(*ends)
    model = empty_model(config)
    model.tie_weights()
    for at, module in model.named_modules():
        _fill(module, native.get_submodule(at), matrices.get(at))
    layers = {at: one for at, one in native.named_modules() if _is_by_channel(one)}
    return Dequantized(
        model.eval(),
        {at: one.weight.detach() for at, one in layers.items()},
        {at: one.scales.detach()[:, 0].float() for at, one in layers.items()},
    )


def _matrix(module: nn.Module) -> Tensor | None:
    """(outputs, inputs) float32 of a layer; of an embedding (rows, width)."""
    if (weights := weights_of(module)) is None:
        return None
    matrix = weights.dequantize()
    if isinstance(module, SharedEmbedding) and weights.input_scale is not None:
        matrix = matrix / weights.input_scale
    return matrix


def _is_by_channel(module: Any) -> bool:
    if not isinstance(module, NativeLinear) or module.kind != "int8" or module.scales is None:
        return False
    return bool((module.scales == module.scales[:, :1]).all())


@torch.no_grad()
def _fill(module: nn.Module, source: nn.Module, matrix: Tensor | None) -> None:
    """Copies the parameters and saved buffers of one module; of a layer its ``matrix``."""
    for key, parameter in module.named_parameters(recurse=False):
        if key == "weight" and matrix is not None:
            parameter.copy_(matrix.t() if isinstance(module, Conv1D) else matrix)
        else:
            parameter.copy_(source.get_parameter(key))
    for key, buffer in module.named_buffers(recurse=False):
        if key not in module._non_persistent_buffers_set:
            buffer.copy_(source.get_buffer(key))
