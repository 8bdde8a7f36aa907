"""Quantizes a converted model by ai-edge-quantizer, and writes it for several lengths of the cache. Runs in
the converter's environment: ``python -m loaders.litert.quantize JOB``, a JSON file.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loaders.litert.lengths import STAND_IN, at_lengths, read, write
from loaders.litert.messages import reported, tell
from loaders.litert.steps import CHUNK, Description, step_name
from loaders.litert.trained import KEPT, keep_trained

_WEIGHTS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")
_LOWEST = np.finfo(np.float32).min


def main(job_file: str) -> None:
    """Writes ``model.tflite`` in ``job["precision"]`` for the lengths of ``job["lengths"]``.

    With a file of trained layers (``job["trained"]``) their names are written to ``KEPT``.
    """
    job = json.loads(Path(job_file).read_text())
    graph, out = Path(job["graph"]), Path(job["out"])
    quantized = out / "quantized.tflite"
    if job["precision"] == "litert-fp32":
        shutil.copyfile(graph / "graph.tflite", quantized)
    else:
        _quantize(job, graph, quantized)
    tell("writing", 0, 0)
    model = read(quantized)
    if "trained" in job:
        description = Description.from_json((graph / "graph.json").read_text())
        kept = keep_trained(model, description.names, Path(job["trained"]))
        (out / KEPT).write_text(json.dumps(kept))
    at_lengths(model, job["lengths"])
    write(model, out / "model.tflite")
    quantized.unlink()


def _quantize(job: dict[str, Any], graph: Path, out: Path) -> None:
    from ai_edge_quantizer import quantizer, recipe_manager  # type: ignore[import-not-found]

    manager, names = recipe_manager.RecipeManager(), quantizer.AlgorithmName
    tell("quantizing", 0, 0)
    result = None
    if job["precision"] == "litert-fp16":
        for operation in _WEIGHTS:
            manager.add_weight_only_config(".*", operation, num_bits=16, algorithm_key=names.FLOAT_CASTING)
    elif job["precision"] == "litert-int8":
        for operation in _WEIGHTS:
            manager.add_dynamic_config(".*", operation, num_bits=8)
    else:
        manager.add_dynamic_config(".*", "EMBEDDING_LOOKUP", num_bits=8)
        manager.add_static_config(job["layers"], "FULLY_CONNECTED", activation_num_bits=8, weight_num_bits=8)
    one = quantizer.Quantizer(str(graph / "graph.tflite"))
    one.load_quantization_recipe(manager.get_quantization_recipe())
    if one.need_calibration:
        description = Description.from_json((graph / "graph.json").read_text())
        samples = np.load(job["samples"])
        name = step_name(1, CHUNK, STAND_IN)
        tell("calibrating", 0, 0)
        result = one.calibrate({name: _Passes(graph / "graph.tflite", samples, description)}, num_threads=2)
        result = {**result, **_shared(read(graph / "graph.tflite"), result)}
    one.quantize(result).export_model(str(out))


class _Passes:
    """The inputs of the step that reads a chunk, for every chunk of every sample.

    They are computed whenever they are iterated, twice by ai-edge-quantizer: each holds a whole cache.
    """

    def __init__(self, path: Path, samples: Any, description: Description) -> None:
        self._path, self._samples, self._description = path, samples, description

    def __len__(self) -> int:
        return int(len(self._samples) * (self._samples.shape[1] // CHUNK))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(model_path=str(self._path), num_threads=2).get_signature_runner(
            step_name(1, CHUNK, STAND_IN)
        )
        for number, sample in enumerate(self._samples, 1):
            yield from self._sample(runner, sample)
            tell("calibrating", number, len(self._samples))

    def _sample(self, runner: Any, sample: Any) -> Iterator[dict[str, Any]]:
        described, one = self._description, np.ones(1, np.float32)
        caches = (described.heads, STAND_IN, described.width)
        names = [f"{side}_{layer}" for side in ("keys", "values") for layer in range(described.layers)]
        past = {name: np.zeros(caches, np.float32) for name in names}
        for start in range(0, len(sample) - CHUNK + 1, CHUNK):
            tokens = sample[None, start : start + CHUNK].astype(np.int32)
            positions = np.arange(start, start + CHUNK, dtype=np.int32)[None]
            masks = {
                f"masks_{at}": _mask(start, window, described.queries)
                for at, window in enumerate(described.windows.values())
            }
            held = {name: cache.copy() for name, cache in past.items()}
            given = {"one": one, "tokens": tokens, "positions": positions, **masks, **held}
            yield given
            found = runner(**given)
            for name, cache in past.items():
                cache[:, start : start + CHUNK] = found[f"new_{name}"][0]


def _mask(start: int, window: int | None, queries: int) -> Any:
    distance = np.arange(start, start + CHUNK)[:, None] - np.arange(STAND_IN)
    hidden = np.arange(STAND_IN)[None] >= start
    if window is not None:
        hidden = hidden | (distance >= window)
    mask = np.where(np.broadcast_to(hidden, distance.shape), _LOWEST, np.float32(0))
    return np.tile(mask, (queries, 1))[None].astype(np.float32)


def _shared(model: Any, result: dict[str, Any]) -> dict[str, Any]:
    """The ranges of the other steps' layers: those of the calibrated step, so that all steps agree."""
    calibrated = next(
        s for s in model.signatureDefs if s.signatureKey.decode() == step_name(1, CHUNK, STAND_IN)
    )
    ranges = {}
    for weight, before, after in _layers(model, calibrated.subgraphIndex):
        ranges[weight] = result.get(before), result.get(after)
    shared = {}
    for signature in model.signatureDefs:
        if signature is not calibrated:
            for weight, before, after in _layers(model, signature.subgraphIndex):
                shared[before], shared[after] = ranges[weight]
    return {name: found for name, found in shared.items() if found is not None}


def _layers(model: Any, graph: int) -> Iterator[tuple[int, str, str]]:
    """(buffer of the weights, input's name, output's name) of every fully connected layer."""
    from ai_edge_litert import schema_py_generated as schema

    subgraph = model.subgraphs[graph]
    for operator in subgraph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        if max(code.builtinCode, code.deprecatedBuiltinCode) == schema.BuiltinOperator.FULLY_CONNECTED:
            before, weight, after = (
                subgraph.tensors[at] for at in (*operator.inputs[:2], operator.outputs[0])
            )
            yield weight.buffer, before.name.decode(), after.name.decode()


if __name__ == "__main__":
    with reported():
        main(sys.argv[1])
