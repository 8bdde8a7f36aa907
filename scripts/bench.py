#!/usr/bin/env python3
"""Decode speed of each precision through the engine, beside transformers' ``generate`` in the same run.

    .venv/bin/python scripts/bench.py [--model MODEL] [--precisions fp32,int8,…] [--batches 1,8,16]

Per precision and batch: decoded tokens per second while every row is decoding, greedy, random prompts.
The two are run in turn, ``--repeat`` times after a warm-up; medians are shown. Prints a table for people
and one JSON line last.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import loaders
from loaders.base import LoadedModel, ModelSpec, default_device
from loaders.checkpoint import open_checkpoint
from loaders.torch_runner import TorchRunner
from server.engine import Engine
from server.sequence import SamplingParams


def prompts(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    found: list[list[int]] = torch.randint(1, vocabulary, (rows, length), generator=generator).tolist()
    return found


async def engine_run(engine: Engine, batch: list[list[int]], tokens: int) -> tuple[float, float]:
    """(seconds to the last row's first token, tokens a second from there on).

    Only tokens that arrived after every row had its first are counted, and only until the first row
    ended: all rows are then decoding, and none of the time is prefill.
    """
    params = SamplingParams(tokens, ignore_eos=True)

    async def run(prompt: list[int]) -> list[float]:
        return [time.perf_counter() async for _ in engine.generate(prompt, params)]

    started = time.perf_counter()
    arrivals = await asyncio.gather(*(run(prompt) for prompt in batch))
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    counted = sum(begin < time <= end for times in arrivals for time in times)
    return begin - started, counted / (end - begin)


def generate_seconds(model: Any, batch: list[list[int]], tokens: int) -> float:
    """Seconds of the decode steps of ``generate``: a run of ``tokens`` less a run of one."""
    ids = torch.tensor(batch, device=model.device)

    def run(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - started

    return run(tokens) - run(1)


async def measure(loaded: LoadedModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    runner = loaded.runner
    model = runner._live if isinstance(runner, TorchRunner) else None
    engine = Engine(loaded, eos_ids=frozenset())
    await engine.start()
    rows = []
    for count in args.batches:
        batch = prompts(count, args.prompt, runner.vocabulary)
        ours, theirs, first = [], [], []
        await engine_run(engine, batch, 8)
        for _ in range(args.repeat):
            to_first, speed = await engine_run(engine, batch, args.tokens)
            first.append(to_first)
            ours.append(speed)
            if model is not None:
                seconds = await asyncio.to_thread(generate_seconds, model, batch, args.tokens)
                theirs.append(count * (args.tokens - 1) / seconds)
        rows.append(
            {
                "precision": loaded.precision,
                "batch": count,
                "tokens_per_second": statistics.median(ours),
                "spread": (max(ours) - min(ours)) / statistics.median(ours),
                "generate_tokens_per_second": statistics.median(theirs) if theirs else None,
                "first_token_ms": statistics.median(first) * 1000,
                "weights_bytes": loaded.footprint.weights_bytes,
                "load_seconds": loaded.load_seconds,
            }
        )
        show(rows[-1])
    await engine.stop()
    return rows


def show(row: dict[str, Any]) -> None:
    other, speed = row["generate_tokens_per_second"], row["tokens_per_second"]
    ratio = f"{other:>10.1f} {speed / other:>7.2f}" if other else f"{'–':>10} {'–':>7}"
    print(
        f"{row['precision']:<14}{row['batch']:>5} {speed:>10.1f} ±{row['spread'] / 2:>4.0%} {ratio}"
        f" {row['first_token_ms']:>12.1f} {row['weights_bytes'] / 1e6:>10.1f} {row['load_seconds']:>7.1f}",
        flush=True,
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode speed of each precision beside generate.")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--precisions", default=",".join(loaders.PRECISIONS))
    parser.add_argument("--batches", type=numbers, default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=48, help="tokens generated per row")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    spec = ModelSpec(open_checkpoint(args.model), default_device(), slots=max(args.batches))
    print(
        f"{spec.checkpoint.model_id} on {spec.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print(f"{'precision':<14}{'rows':>5} {'tok/s':>10}       {'generate':>10} {'ratio':>7} {'first ms':>12} "
          f"{'MB':>10} {'load s':>7}")  # fmt: skip
    rows = []
    for name in args.precisions.split(","):
        if loaders.availability(name, spec.device).ok:
            rows += asyncio.run(measure(loaders.load(name, spec), args))
    print(json.dumps({"host": platform.processor() or platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
