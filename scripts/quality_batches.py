#!/usr/bin/env python3
"""Measures the gain of evaluating several windows of a text in one batch: interleaved runs, medians.

    .venv/bin/python scripts/quality_batches.py [--model bundled] [--window 512] [--batches 1,2,4]

Prints milliseconds per window: of the forward passes, and in total including the comparison with fp32.
One JSON line last.
"""

import argparse
import json
import statistics
import sys
import time
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import loaders
from loaders.base import LoadedModel, ModelSpec, default_device
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.quality import measure
from loaders.texts import Text, held_out
from server.host.threads import compute_with, default_threads


def beginning(size: int) -> Text:
    with held_out().open() as stream:
        data = stream.read(size).decode(errors="ignore").encode()
    return Text("held-out text", len(data), lambda: BytesIO(data))


def once(
    models: list[LoadedModel], text: Text, spec: ModelSpec, window: int, batch: int
) -> tuple[int, float, float]:
    """The batch size used; ms per window of the candidate's passes, and in total."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(spec.checkpoint)
    (found,) = measure(models[0], models[1:], text, tokenizer, window=window, batch=batch, prompts=0)
    windows = max(1, -(-(found.tokens - window) // found.stride) + 1)
    seconds = time.perf_counter() - started
    return found.batch, 1e3 * found.seconds / windows, 1e3 * seconds / windows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--precisions", default="fp32,nf4")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batches", default="1,2,4")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=20_000, help="of text")
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    compute_with(options.threads)
    spec = ModelSpec(open_checkpoint(options.model), device=default_device(), slots=1)
    text, figures = beginning(options.bytes), []
    reference = loaders.load("fp32", spec)
    for precision in options.precisions.split(","):
        models = [reference, loaders.load(precision, spec)]
        runs: dict[int, list[tuple[float, float]]] = {}
        for _ in tqdm(range(options.repeat), desc=precision):
            for batch in map(int, options.batches.split(",")):
                together, passes, everything = once(models, text, spec, options.window, batch)
                runs.setdefault(together, []).append((passes, everything))
        models[1].close()
        for batch, several in runs.items():
            passes, everything = (statistics.median(column) for column in zip(*several, strict=True))
            print(
                f"{precision:<13}{batch:>4} together: {passes:8.2f} ms a window, with all {everything:8.2f}"
            )
            figures.append({"precision": precision, "batch": batch, "pass_ms": passes, "all_ms": everything})
    print(json.dumps({"model": spec.checkpoint.model_id, "window": options.window, "figures": figures}))


if __name__ == "__main__":
    main()
