"""The weights of onnx-int4: four bits by GPTQ, block by block; eight for the layers that lose most."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders.base import Progress
from loaders.layers.affine_blocks import AffineBlocks, quantize
from loaders.layers.norm_folding import fold_into_weights
from loaders.precisions.blockwise import quantize_blocks, sensitive_layers, targets

SAMPLES, LENGTH = 32, 512


def four_bit_layers(model: PreTrainedModel) -> set[str]:
    """Names of the layers in four bits; all other linear layers have eight."""
    return {name for name, _ in targets(model)} - sensitive_layers(model)


def quantize_weights(
    model: PreTrainedModel, samples: Tensor, progress: Progress
) -> tuple[dict[str, AffineBlocks], dict[str, Tensor]]:
    """Gives each linear layer the values that its blocks stand for.

    Args:
        model: in float32.
        samples: (samples, length) token ids.

    Returns: the blocks by layer, and the factors of ``fold_into_weights`` that they include.

    Raises:
        CheckpointError: the model's blocks don't follow each other.
    """
    factors, four_bits = fold_into_weights(model, head=False), four_bit_layers(model)
    found: dict[str, AffineBlocks] = {}

    def replace(name: str, layer: Any, hessian: Tensor | None) -> None:
        weight: Tensor = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        bits = 4 if name in four_bits else 8
        found[name] = quantize(weight.detach().contiguous(), bits, hessian if bits == 4 else None)
        weight.copy_(found[name].dequantize())

    inside = {layer for _, layer in targets(model)}
    with torch.inference_mode():
        for name, module in model.named_modules():  # first the head: a tied embedding is read from it
            if isinstance(module, nn.Linear | Conv1D) and module not in inside:
                replace(name, module, None)
    quantize_blocks(model, samples, replace, progress)
    return found, factors
