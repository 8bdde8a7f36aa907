"""Quantizes a converted model by ai-edge-quantizer, and writes it for several lengths of the cache. Runs in
the converter's environment: ``python -m loaders.litert.quantize JOB``, a JSON file.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from loaders.litert.calibrate import calibrate
from loaders.litert.lengths import at_lengths, read, write
from loaders.litert.messages import reported, tell
from loaders.litert.steps import DYNAMIC, TRAINED, Description
from loaders.litert.trained import keep_trained

_WEIGHTS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")


def main(job_file: str) -> None:
    """Writes ``model.tflite`` in ``job["precision"]`` for the lengths of ``job["lengths"]``.

    With a file of trained layers (``job["trained"]``) their names are written to ``TRAINED``.
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
        (out / TRAINED).write_text(json.dumps(kept))
    at_lengths(model, job["lengths"])
    write(model, out / "model.tflite")
    quantized.unlink()


def _quantize(job: dict[str, Any], graph: Path, out: Path) -> None:
    from ai_edge_quantizer import quantizer, recipe_manager  # type: ignore[import-not-found]

    manager, names = recipe_manager.RecipeManager(), quantizer.AlgorithmName
    ranges = None
    if job["precision"] == "litert-fp16":
        for operation in _WEIGHTS:
            manager.add_weight_only_config(".*", operation, num_bits=16, algorithm_key=names.FLOAT_CASTING)
    else:
        for operation in _WEIGHTS:
            manager.add_dynamic_config(".*", operation, num_bits=8)
    if "samples" in job:
        found = calibrate(graph, np.load(job["samples"]), job["least_sqnr_db"])
        ranges = found.ranges
        if found.operators:
            manager.add_static_config(
                found.operators, "FULLY_CONNECTED", activation_num_bits=8, weight_num_bits=8
            )
        (out.parent / DYNAMIC).write_text(json.dumps(found.dynamic))
    tell("quantizing", 0, 0)
    one = quantizer.Quantizer(str(graph / "graph.tflite"))
    one.load_quantization_recipe(manager.get_quantization_recipe())
    one.quantize(ranges).export_model(str(out))


if __name__ == "__main__":
    with reported():
        main(sys.argv[1])
