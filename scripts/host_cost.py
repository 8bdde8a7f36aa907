#!/usr/bin/env python3
"""Measures what a decode step costs the host; the device takes no time here.

    .venv/bin/python scripts/host_cost.py [--rows 1 8 16 32 64] [--tokens 300] [--repeats 7]

An engine serves a GPU's runner over a tiny GPT-2 on the CPU. Replaying a graph does nothing; inputs,
sampling, scheduling, overlap, the event loop and its consumers, and the metrics are real. Operations on
tiny tensors take the place of kernel launches. The worker thread and the event loop share the GIL, so a
step takes about the sum of both. Prints microseconds; one JSON line last.
"""

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loaders.base import Checkpoint, Footprint, LoadedModel, ModelSpec
from loaders.cuda.graph_runner import GraphRunner
from loaders.runner import DeviceRunner
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams, StepStats
from server.host.threads import compute_with
from server.observability.metrics import Metrics

VOCABULARY, PROMPT, PRECISION = 8, 4, "fp32"
SPARED = 20  # steps at either end of a repeat, while rows start and finish
MICROSECONDS = 1e6


class NoDevice:
    """Implements ``loaders.cuda.cuda_graphs.Graphs``: replaying takes no time, and computes nothing."""

    nbytes = 0

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        return lambda: None


def model(slots: int, tokens: int) -> LoadedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=PROMPT + tokens, n_embd=8, n_layer=1, n_head=1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    network = GPT2LMHeadModel(config).eval()
    checkpoint = Checkpoint(
        "tiny", None, Path(), config, type(network).__name__, PROMPT + tokens, VOCABULARY, frozenset(), 0
    )
    spec = ModelSpec(checkpoint, slots=slots, batch_invariant=False)
    runner = GraphRunner(network, spec, NoDevice())
    assert isinstance(runner, DeviceRunner), "a step must be launched ahead of the last one's tokens"
    return LoadedModel(PRECISION, runner, Footprint(0, {}, {}, 0, 32.0, 0))


class Watch:
    """Receives every step; reads the clocks once all ``rows`` run together, and before they end."""

    def __init__(self, rows: int, steps: int) -> None:
        self._rows, self._last, self._seen = rows, steps, 0
        self._begun = self._ended = (0.0, 0.0, 0.0)
        (worker,) = (one.ident for one in threading.enumerate() if one.name.startswith("engine-"))
        assert worker is not None
        self._worker_clock = time.pthread_getcpuclockid(worker)
        self.metrics = Metrics("tiny")

    def __call__(self, step: StepStats) -> None:
        self.metrics.observe_step(PRECISION, step)
        self._seen += step.batch == self._rows and not step.prompt_tokens
        if self._seen == SPARED:
            self._begun = self._clocks()
        elif self._seen == self._last:
            self._ended = self._clocks()

    def _clocks(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.clock_gettime(self._worker_clock), time.thread_time()

    def figures(self) -> dict[str, float]:
        assert self._ended[0], "too few steps had all rows"
        steps = (self._last - SPARED) / MICROSECONDS
        took = [(end - begin) / steps for begin, end in zip(self._begun, self._ended, strict=True)]
        return dict(zip(("step", "worker", "loop"), took, strict=True))


async def measured(rows: int, options: argparse.Namespace) -> dict[str, float]:
    """The median of each figure over the repeats."""
    watch: Watch | None = None

    def on_step(step: StepStats) -> None:
        if watch is not None:
            watch(step)

    async def read() -> None:
        params = SamplingParams(options.tokens, ignore_eos=True)
        async for _ in engine.generate([5] * PROMPT, params):
            pass

    engine = Engine(
        model(options.slots, options.tokens),
        eos_ids=frozenset(), prefill_chunk=options.slots * PROMPT, threads=1, on_step=on_step,
    )  # fmt: skip
    await engine.start()
    found = []
    for _ in tqdm(range(options.repeats), desc=f"{rows} rows", leave=False):
        watch = Watch(rows, options.tokens - SPARED)
        await asyncio.gather(*(read() for _ in range(rows)))
        found.append(watch.figures())
    await engine.stop()
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300, help="of each row in a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    compute_with(1)
    torch.manual_seed(0)
    found = [{"rows": rows, **asyncio.run(measured(rows, options))} for rows in options.rows]
    print(f"{'rows':>6}{'a step':>10}{'worker CPU':>12}{'loop CPU':>10}   microseconds")
    for row in found:
        print(f"{row['rows']:>6}{row['step']:>10.0f}{row['worker']:>12.0f}{row['loop']:>10.0f}")
    print(json.dumps({"torch": torch.__version__, "slots": options.slots, "figures": found}))


if __name__ == "__main__":
    main()
