"""Whether an exported graph computes what the model does, in rows of different lengths as well."""

from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders.base import ModelSpec
from loaders.errors import CheckpointError
from loaders.onnx.weights import GraphWeights
from loaders.runners.batching_check import check_rows
from loaders.runners.onnx_runner import OnnxRunner

_LONG, _BEYOND, _FARTHEST = 24, 8, 1024  # tokens: of the text, or beyond an attention window up to the last
_TOLERANCE = 1e-3  # relative error of logits; rounding in float32 makes 1e-6, another function 1e-1


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, spec: ModelSpec) -> Tensor:
    """(tokens, vocabulary) logits of the model's own forward pass on the text of ``check_graph``."""
    ids = _text(spec)
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].float()


def check_graph(path: Path, spec: ModelSpec, expected: Tensor) -> None:
    """
    Args:
        path: the graph in float32.
        expected: from ``expected_logits``, before the model was exported.

    Raises:
        CheckpointError: the graph computes something else, or its rows disturb each other.
    """
    name = spec.checkpoint.architecture
    runner = OnnxRunner(path, spec, GraphWeights(path, []))
    try:
        ids = _text(spec)
        found = runner.score(ids)
        if not float((found - expected).norm()) <= _TOLERANCE * float(expected.norm()):
            raise CheckpointError(f"{name} can't be exported to ONNX: the graph computes other logits")
        check_rows(runner, spec.checkpoint.config, name)
    finally:
        runner.close()


def _text(spec: ModelSpec) -> list[int]:
    checkpoint, random = spec.checkpoint, Random(0)
    window = getattr(checkpoint.config.get_text_config(), "sliding_window", None) or 0
    tokens = max(_LONG, window + _BEYOND if window <= _FARTHEST else 0)
    return [random.randrange(checkpoint.vocabulary) for _ in range(min(tokens, spec.max_tokens))]
