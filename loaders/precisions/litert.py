"""litert-fp32, litert-fp16, litert-int8, litert-full-int8: a .tflite file, computed by LiteRT on XNNPACK.

``model.tflite`` is the product; ``model.json`` describes it for the runner.
"""

import json
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from loaders.artifacts.dequantized import dequantized
from loaders.artifacts.prepare import prepare
from loaders.base import Availability, LoadedModel, ModelSpec, Progress, Recipe
from loaders.calibration import calibration_samples
from loaders.errors import CheckpointError
from loaders.footprint import count_parameters
from loaders.litert import environment, suited
from loaders.litert.model import LiteRTModel
from loaders.litert.steps import CHUNK, DYNAMIC, SIZES, TRAINED, Description, cache_lengths
from loaders.litert.trained import CODES, SCALES
from loaders.litert.weights import Weights
from loaders.manifest import read_manifest
from loaders.precisions.qat import granularity_of
from loaders.pretrained import meta_model, save_pretrained
from loaders.runners.batching_check import check_numbers
from loaders.runners.litert_runner import LiteRTRunner

_FORMAT = 1
_SAMPLES = 128
_SAMPLE_CHUNKS = 4
_CALIBRATED = ("litert-full-int8",)
_QUANTIZING = ("litert-int8", "litert-full-int8")
_ROW_STATE = 4 + 8  # bytes of a row's scale and zero point
SOURCES = ("qat-int8",)
"""Saved precisions that files can be made from."""
_LEAST_SQNR_DB = 30.0
"""Of a layer's outputs with constant ranges of activations; layers below it take them while computing."""


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if device == "cuda":
        return Availability("LiteRT's kernels for this format run on CPUs only")
    if find_spec("ai_edge_litert") is None:
        return Availability("ai-edge-litert is not installed", "pip install 'bitdial[litert]'")
    return Availability(environment.missing())


def refusal(precision: str, spec: ModelSpec) -> str | None:
    return suited.refusal(meta_model(spec))


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    matrices = {
        id(layer.weight): layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        for layer in model.modules()
        if isinstance(layer, nn.Linear | nn.Embedding | Conv1D)
    }
    rest: int = count_parameters(model) - sum(one.numel() for one in matrices.values())
    return 4 * rest + sum(_matrix_bytes(precision, *one.shape) for one in matrices.values())


def _matrix_bytes(precision: str, outputs: int, inputs: int) -> int:
    if precision in _QUANTIZING:
        return outputs * (inputs + _ROW_STATE)
    return outputs * inputs * (4 if precision == "litert-fp32" else 2)


def recipe(precision: str, spec: ModelSpec) -> Recipe:
    options: dict[str, Any] = {"format": _FORMAT, "converter": environment.VERSIONS}
    if precision in _CALIBRATED:
        options |= {"samples": _SAMPLES, "length": _SAMPLE_CHUNKS * CHUNK, "least_sqnr_db": _LEAST_SQNR_DB}
    return Recipe(precision, options, calibrated=precision in _CALIBRATED)


def make(precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None:
    """Writes ``model.tflite`` and ``model.json``; the converted graph is cached for the other precisions.

    Raises:
        CheckpointError: the architecture can't be converted.
        ConverterUnavailable, CalibrationError
    """
    samples = None
    if precision in _CALIBRATED:  # first: what is wrong with the text is known before any work
        samples = calibration_samples(spec, _SAMPLES, _SAMPLE_CHUNKS * CHUNK)
    with TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        graph, trained = _graph(spec, scratch, progress)
        job: dict[str, Any] = {
            "precision": precision,
            "graph": str(graph),
            "out": str(scratch),
            "lengths": cache_lengths(spec.checkpoint.context_length),
            "least_sqnr_db": _LEAST_SQNR_DB,
        }
        if samples is not None:
            job["samples"] = str(scratch / "samples.npy")
            np.save(job["samples"], samples.numpy())
        if trained is not None and precision in _QUANTIZING:
            job["trained"] = str(trained)
        environment.run("loaders.litert.quantize", job, scratch, progress)
        (scratch / "model.tflite").rename(folder / "model.tflite")
        (folder / "model.json").write_text(_describe(graph, scratch).to_json())


def _describe(graph: Path, scratch: Path) -> Description:
    """The graph's description, with the layers that the quantizer listed."""
    trained, dynamic = (
        json.loads((scratch / name).read_text()) if (scratch / name).exists() else None
        for name in (TRAINED, DYNAMIC)
    )
    description = Description.from_json((graph / "graph.json").read_text())
    return replace(description, trained=trained, dynamic=dynamic)


def _graph(spec: ModelSpec, scratch: Path, progress: Progress) -> tuple[Path, Path | None]:
    """The folder of the converted model in float32, and the file of the trained layers of a saved one.

    An original model's graph is cached.
    """
    if spec.checkpoint.saved is None:
        base = Recipe("litert-graph", {"format": _FORMAT, "converter": environment.VERSIONS})
        return prepare(spec, base, partial(_convert, spec, spec.checkpoint.folder), progress), None
    found, trained = dequantized(spec, progress), scratch / "codes.safetensors"
    save_pretrained(found.model, scratch / "model", progress)
    codes = {name + CODES: one.contiguous() for name, one in found.codes.items()}
    save_file({**codes, **{name + SCALES: one for name, one in found.scales.items()}}, trained)
    del found
    (scratch / "graph").mkdir()
    _convert(spec, scratch / "model", scratch / "graph", progress)
    return scratch / "graph", trained


def _convert(spec: ModelSpec, model: Path, folder: Path, progress: Progress) -> None:
    job = {"folder": str(model), "out": str(folder), "steps": SIZES}
    try:
        environment.run("loaders.litert.convert", job, folder, progress)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.checkpoint.model_id} can't be converted to LiteRT: {error}") from error


def remark(precision: str, spec: ModelSpec) -> str | None:
    """What a saved checkpoint loses by the conversion."""
    options = read_manifest(spec.checkpoint.folder).recipe["options"]
    if precision not in _QUANTIZING or granularity_of(options) == "channel":
        return None
    return (
        f"its weights were rounded again: {spec.checkpoint.saved} was trained with a scale for a group of "
        "them, LiteRT has one for an output; trained with --granularity channel they are kept"
    )


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    folder = prepare(spec, recipe(precision, spec), partial(make, precision, spec), progress)
    description = Description.from_json((folder / "model.json").read_text())
    weights = Weights(folder / "model.tflite", description.names)
    model = meta_model(spec)
    embeddings = {name for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    quantizes = precision in _QUANTIZING
    reason = "the converter keeps it" if quantizes else "this precision quantizes nothing"
    footprint = weights.footprint(count_parameters(model), embeddings, reason)
    threads = spec.threads or torch.get_num_threads()
    kinds = {name: "EMBEDDING_LOOKUP" if name in embeddings else "FULLY_CONNECTED" for name in weights.layers}
    layers = {name: (kinds[name], one) for name, one in weights.layers.items()}
    steps = LiteRTModel(folder / "model.tflite", description, threads, share=not quantizes)
    runner = LiteRTRunner(steps, layers, spec.slots, spec.max_tokens)
    check_numbers(runner, spec.checkpoint.architecture, torch.float32)
    details: dict[str, Any] = {
        "kernels": "LiteRT, XNNPACK",
        "file_bytes": (folder / "model.tflite").stat().st_size,
    }
    if description.trained is not None:
        details["trained_layers"] = len(description.trained)
    if description.dynamic is not None:
        details["dynamic_layers"] = list(description.dynamic)
    return LoadedModel(precision, runner, footprint, details=details)
