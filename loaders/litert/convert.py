"""Converts a checkpoint to LiteRT steps in float32. Runs in the converter's environment:
``python -m loaders.litert.convert JOB``, a JSON file (``Job``); writes progress and errors as ``messages``.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import CheckpointError, in_short
from loaders.layers.attention_masks import Masks
from loaders.litert.lengths import STAND_IN, read
from loaders.litert.messages import reported, tell
from loaders.litert.step import ATTENTION, CacheShape, Step, inputs, own_mask
from loaders.litert.steps import Description, step_name
from loaders.pretrained import load_pretrained

_TEXT = 12  # tokens of the text that the step is checked on
_TOLERANCE = 1e-3  # relative error of logits: float32 rounding makes 1e-6, lost positions 0.5 and more


def main(job_file: str) -> None:
    """Writes ``graph.tflite``, whose caches have the length ``STAND_IN``, and ``graph.json``."""
    job = json.loads(Path(job_file).read_text())
    out = Path(job["out"])
    model, shape, windows = load_checked(Path(job["folder"]))
    steps = [(rows, tokens) for rows, tokens in job["steps"]]
    _convert(model, shape, windows, steps).export(str(out / "graph.tflite"))
    layers = _layers(out / "graph.tflite", model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    description = Description(
        shape.layers, shape.heads, shape.width, shape.queries, vocabulary, windows, layers
    )
    (out / "graph.json").write_text(description.to_json())


def load_checked(folder: Path) -> tuple[Any, CacheShape, dict[str, int | None]]:
    """The model with the step's attention, its cache, and the attention window of each kind of layer.

    Raises:
        CheckpointError: the checkpoint is unusable, or the architecture can't be computed in steps.
    """
    model, windows = _load(folder)
    shape = _shape(model)
    tell("checking the step", 0, 0)
    try:
        _check(model, shape, windows)
    except CheckpointError:
        raise
    except Exception as error:  # a forward pass may raise anything for arguments that it doesn't expect
        raise CheckpointError(
            f"{type(model).__name__} can't be computed in steps ({in_short(error)})"
        ) from error
    return model, shape, windows


def _load(folder: Path) -> tuple[Any, dict[str, int | None]]:
    """The model with the step's attention, and the attention window of each kind of layer."""
    spec = ModelSpec(open_checkpoint(str(folder)))
    model = load_pretrained(spec, tell, dtype=torch.float32, attn_implementation=ATTENTION)
    far = torch.tensor([[2**20]])
    near = Masks(model).of(far, torch.arange(2**20 + 1), torch.float32)
    masks: Mapping[str, Tensor | None] = near if isinstance(near, dict) else {"attention": near}
    seen = {kind: int((mask == 0).sum()) for kind, mask in masks.items() if mask is not None}
    return model, {kind: None if count > 2**20 else count for kind, count in seen.items()}


def _shape(model: Any) -> CacheShape:
    """From one pass in which a cache records what the layers give it."""
    from loaders.cuda.static_cache import ShapeProbe, Unsuitable

    probe = ShapeProbe()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=probe, use_cache=True)
        found = probe.shape()
    except Unsuitable as error:
        raise CheckpointError(str(error)) from error
    finally:
        model.set_attn_implementation(ATTENTION)
    queries = model.config.get_text_config().num_attention_heads // found.heads
    return CacheShape(found.layers, found.heads, found.width, queries)


@torch.no_grad()
def _check(model: Any, shape: CacheShape, windows: dict[str, int | None]) -> None:
    """Compares a text in two steps with the model's own pass over it.

    Raises:
        CheckpointError: the architecture doesn't use the step's positions, masks or attention.
    """
    random = Random(0)
    ids = torch.tensor([[random.randrange(model.config.vocab_size) for _ in range(_TEXT)]])
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids).logits[0, _TEXT // 2 :]
    model.set_attn_implementation(ATTENTION)
    half = _TEXT // 2
    given = inputs(shape, len(windows), 1, half, half)
    step = Step(model, shape, windows, half)
    lowest = torch.finfo(torch.float32).min
    first = {**given, "tokens": ids[:, :half].int(), "positions": torch.arange(half, dtype=torch.int32)[None]}
    first["masks"] = [torch.full_like(mask, lowest) for mask in given["masks"]]
    found = step(**first)
    second = {**first, "tokens": ids[:, half:].int(), "positions": first["positions"] + half}
    second["masks"] = [_past(half, window, shape.queries) for window in windows.values()]
    second["keys"] = [found[f"new_keys_{layer}"][0] for layer in range(shape.layers)]
    second["values"] = [found[f"new_values_{layer}"][0] for layer in range(shape.layers)]
    logits = step(**second)["logits"][0]
    if not float((logits - expected).norm() / expected.norm()) < _TOLERANCE:
        raise CheckpointError(
            f"{type(model).__name__} computes attention in a way of its own, which LiteRT's step doesn't have"
        )


def _past(half: int, window: int | None, queries: int) -> Tensor:
    """The mask of the second half of a text on the first."""
    whole = own_mask(2 * half, window, 1)[:, half:, :half]
    return whole.repeat(1, queries, 1)


def _convert(
    model: Any, shape: CacheShape, windows: dict[str, int | None], steps: list[tuple[int, int]]
) -> Any:
    import litert_torch  # type: ignore[import-not-found]

    torch.set_grad_enabled(False)
    converter: Any = litert_torch
    for rows, tokens in steps:
        given = inputs(shape, len(windows), rows, tokens, STAND_IN)
        step = Step(model, shape, windows, tokens).eval()
        converter = converter.signature(step_name(rows, tokens, STAND_IN), step, sample_kwargs=given)
    tell("converting to LiteRT", 0, 0)
    return converter.convert(strict_export=False)


def _layers(path: Path, model: Any) -> dict[str, list[str]]:
    """The names of the model's layers by the name of the tensor that holds their matrix, by its values."""
    parameters: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() == 2:
            layer, values = name.removesuffix(".weight"), parameter.detach()
            for one in (values, values.t()) if values.shape[0] != values.shape[1] else (values,):
                parameters.setdefault(tuple(one.shape), []).append((layer, one))
            if values.shape[0] == values.shape[1]:
                parameters[tuple(values.shape)].append((layer, values.t()))
    found: dict[str, list[str]] = {}
    graph = read(path)
    for tensor in (tensor for subgraph in graph.subgraphs for tensor in subgraph.tensors):
        data = graph.buffers[tensor.buffer].data
        name, shape = tensor.name.decode(), tuple(tensor.shape if tensor.shape is not None else ())
        if data is None or tensor.type != 0 or shape not in parameters or name in found:
            continue
        values = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
        same = [layer for layer, one in parameters[shape] if torch.equal(one, values)]
        if same:
            found[name] = list(dict.fromkeys(same))
    return found


if __name__ == "__main__":
    with reported():
        main(sys.argv[1])
