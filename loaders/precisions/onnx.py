"""onnx-fp32, onnx-int8, onnx-static-int8, onnx-int4: the model as one graph on ONNX Runtime.

The graph is exported by ``transformers.exporters``, quantized, and kept as a file: in int8 by ONNX Runtime's
own tools, after outlier channels of norms were folded into the weights; in four bits by GPTQ.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders.artifacts import Recipe, prepare
from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.calibration import calibration_samples
from loaders.config_values import other_state
from loaders.footprint import count_parameters, measure_layers, reasons
from loaders.layers.affine_blocks import BLOCK
from loaders.layers.linear_layers import outside_layers
from loaders.layers.longrope import changing_positions
from loaders.layers.norm_folding import fold_into_weights
from loaders.onnx import files, session
from loaders.onnx.calibrate import FARTHEST, PERCENTILE
from loaders.onnx.quantize import weight_bits
from loaders.onnx.suited import attention_refusal
from loaders.onnx.weights import GraphWeights
from loaders.precisions.blockwise import without_blocks
from loaders.precisions.onnx_blocks import LENGTH, SAMPLES, four_bit_layers, quantize_weights
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.batching_check import check_numbers
from loaders.runners.onnx_check import check_graph, expected_logits
from loaders.runners.onnx_runner import OnnxRunner

_FORMATS = {"onnx-fp32": 1}  # raised whenever the same options give other files
_FORMAT = 2  # of the others
_HEADS = ("onnx-int8", "onnx-int4")  # that have quantized heads
_SAMPLES, _TOKENS = 16, 128  # to calibrate ranges on
_CALIBRATED = {"onnx-static-int8": (_SAMPLES, _TOKENS), "onnx-int4": (SAMPLES, LENGTH)}
_PACKAGES = ("onnxruntime", "onnxscript", "torch", "transformers")


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    return session.availability(device)


def refusal(precision: str, spec: ModelSpec) -> str | None:
    """What the exported graph lacks a form for."""
    model = meta_model(spec)
    why = other_state(model.config.get_text_config()) or outside_layers(model)
    why = why or changing_positions(model.config)
    if why is None and precision == "onnx-int4":
        why = without_blocks(model)
    return why or attention_refusal(spec.checkpoint.config)


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    size = 4 * count_parameters(model)
    if precision == "onnx-fp32":
        return size
    head, tied = model.get_output_embeddings(), files.Head(model).embedding is not None
    four_bits = four_bit_layers(model) if precision == "onnx-int4" else ()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and (layer is not head or _quantizes_head(precision, spec)):
            copies = 2 if layer is head and tied else 1  # one to look up, one to multiply
            bits = 4 if name in four_bits else 8
            size += copies * _quantized_bytes(layer, precision, bits) - 4 * layer.weight.numel()
    return size


def _quantizes_head(precision: str, spec: ModelSpec) -> bool:
    return precision == "onnx-int4" or (precision == "onnx-int8" and spec.quantize_lm_head)


def _quantized_bytes(layer: nn.Linear | Conv1D, precision: str, bits: int) -> int:
    """Of the codes, scales and zero points."""
    weights, outputs = layer.weight.numel(), layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
    if precision != "onnx-int4":
        return weights + 4 * outputs
    return weights * bits // 8 + weights // BLOCK * (4 + bits // 8)


def recipe(precision: str, spec: ModelSpec) -> Recipe:
    options: dict[str, Any] = {"format": _FORMATS.get(precision, _FORMAT)}
    if precision == "onnx-int8":
        options |= {"quantize_lm_head": spec.quantize_lm_head, "levels": 127, "weight_bits": weight_bits()}
    if precision == "onnx-static-int8":
        options |= {"samples": _SAMPLES, "tokens": _TOKENS, "percentile": PERCENTILE, "farthest": FARTHEST}
        options |= {"levels": 127, "weight_bits": weight_bits()}
    if precision == "onnx-int4":
        options |= {"samples": SAMPLES, "length": min(LENGTH, spec.max_tokens)}
    return Recipe(precision, options, _PACKAGES, calibrated=precision in _CALIBRATED)


def make(precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None:
    samples = _samples(precision, spec)  # first: it may refuse the text
    model = load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu").requires_grad_(False)
    head, keep_head = files.Head(model), not _quantizes_head(precision, spec)
    if precision == "onnx-int4":
        blocks, factors = quantize_weights(model, samples, progress)
        expected = expected_logits(model, spec)
    else:
        blocks, expected = {}, expected_logits(model, spec)
        factors = {} if precision == "onnx-fp32" else fold_into_weights(model, head=not keep_head)
    progress("exporting", 0, 0)
    path = folder / files.FLOAT
    files.write_float(model, spec.checkpoint.model_id, path, separate_head=precision in _HEADS)
    del model
    check_graph(path, spec, expected)
    progress("quantizing", 0, 0)
    match precision:
        case "onnx-fp32":
            files.finish(files.read(path), folder, factors)
        case "onnx-static-int8":
            files.quantize_static_int8(folder, head, samples, factors)
        case "onnx-int4":
            files.write_int4(folder, head, blocks, factors)
        case _:
            files.quantize_int8(folder, head, keep_head, factors)


def _samples(precision: str, spec: ModelSpec) -> Tensor:
    """(samples, tokens) ids to calibrate on; none where nothing is calibrated."""
    if precision not in _CALIBRATED:
        return torch.empty(0, 0, dtype=torch.int64)
    return calibration_samples(spec, *_CALIBRATED[precision])


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    folder = prepare(spec, recipe(precision, spec), partial(make, precision, spec), progress)
    model = meta_model(spec)
    names = [
        name for name, one in model.named_modules() if isinstance(one, nn.Linear | Conv1D | nn.Embedding)
    ]
    weights = GraphWeights(folder / files.SERVED, names)
    layers = {name: found for name, (_, found) in weights.layers().items()}
    why = (
        "this precision quantizes nothing"
        if precision == "onnx-fp32"
        else "the head was left in fp32 by choice"
    )
    footprint = measure_layers(layers, weights.by_dtype(), model, reasons(model, why))
    runner = OnnxRunner(folder / files.SERVED, spec, weights)
    check_numbers(runner, spec.checkpoint.architecture, torch.float32)
    return LoadedModel(precision, runner, footprint, details=_details(precision, weights))


def _details(precision: str, weights: GraphWeights) -> dict[str, Any]:
    details: dict[str, Any] = {"kernels": "ONNX Runtime"}
    if precision == "onnx-int8":
        details |= {"activation_group_size": "row", "weight_scales_per_output": 1}
        details |= {"activation_bits": 8, "weight_bits": weight_bits()}
    if precision == "onnx-static-int8":
        details |= {
            "activations": "one calibrated range a layer",
            "weight_bits": weight_bits(),
            "by_row_because_of_outliers": weights.by_row(),
        }
    if precision == "onnx-int4":
        details |= {"block_size": BLOCK, "head": "torch.int8", "activation_group_size": BLOCK}
        details["calibration"] = "GPTQ"
    return details
