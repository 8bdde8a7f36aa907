"""``transformers``' own modes of generation, in this process on the same GPU."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import GenerationConfig

from loaders.base import ModelSpec
from server.bench.contenders import Contender, Prompts
from server.bench.figures import Run, summarize
from server.bench.gpu.result import Result
from server.bench.reference import Generate, load_reference
from server.bench.session import Plan, Row, prompts_of
from server.bench.worker import BatchEngine

GENERATE, STATIC, CONTINUOUS = "generate", "static + compile", "continuous batching"
_CACHE_SHARE = 0.4  # of free memory, for the cache of continuous batching


class InProcess:
    """A lockstep engine as a contender. Runs on the calling thread: compiled graphs are bound to one."""

    def __init__(self, name: str, engine: BatchEngine) -> None:
        self.name, self.weights_bytes, self._engine = name, engine.weights_bytes, engine

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        times, ids = self._engine.run(prompts, tokens)
        return Run([times] * len(prompts), times[0], ids)

    async def close(self) -> None:
        self._engine.close()


class ContinuousBatching:
    """``generate_batch``; its manager and graphs persist between runs."""

    name = CONTINUOUS
    weights_bytes: int | None = None

    def __init__(self, precision: str, spec: ModelSpec) -> None:
        self._model: Any = load_reference(precision, spec)

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        started = time.perf_counter()
        outputs = self._model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=_sized(prompts, tokens, self._model.device.type),
            record_timestamps=True,
            persistent_manager=True,
        )
        rows = [output for output in outputs.values() if not output.error]
        if len(rows) != len(prompts):
            raise RuntimeError(f"{len(prompts) - len(rows)} of {len(prompts)} requests failed")
        arrivals = [[moment - started for moment in row.timestamps] for row in rows]
        return Run(arrivals, max(row[0] for row in arrivals))  # ordered by their end: tokens are omitted

    async def close(self) -> None:
        if hasattr(self._model, "destroy_cached_continuous_batching_manager"):
            self._model.destroy_cached_continuous_batching_manager()
        self._model = None


def _sized(prompts: Prompts, tokens: int, device: str) -> Any:
    # late: missing in older versions
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    if device == "cuda":
        return ContinuousBatchingConfig(max_memory_percent=_CACHE_SHARE)
    held = sum(len(prompt) + tokens for prompt in prompts)
    return ContinuousBatchingConfig(num_blocks=len(prompts) + 1 + held // 256, max_batch_tokens=256)


async def generate(precision: str, spec: ModelSpec) -> Contender:
    """``generate`` with its default dynamic cache."""
    return InProcess(GENERATE, Generate(precision, spec))


def static(precision: str, spec: ModelSpec) -> Contender:
    """``generate`` with a static cache, for which it compiles the forward pass on a GPU."""
    return InProcess(STATIC, Generate(precision, spec, cache_implementation="static"))


def measure(make: Callable[[], Contender], plan: Plan, batch: int, precision: str) -> Row:
    """Measures one rival alone at one batch size. The first run, which compiles or captures, is dropped."""
    contender = make()
    prompts = prompts_of(batch, plan.prompt, plan.vocabulary)
    try:
        runs = [asyncio.run(contender.run(prompts, plan.tokens)) for _ in range(1 + plan.repeat)]
    finally:
        asyncio.run(contender.close())
    return Row(precision, batch, contender.name, summarize(runs[1:], plan.prompt))


def measure_into(
    result: Result, model: str, spec: ModelSpec, plan: Plan, precision: str, which: str, batch: int
) -> None:
    """Adds the row, or the reason for skipping it: some versions of ``transformers`` lack a mode."""
    makers: dict[str, Callable[[], Contender]] = {
        STATIC: partial(static, precision, spec),
        CONTINUOUS: partial(ContinuousBatching, precision, spec),
    }
    try:
        row = measure(makers[which], plan, batch, precision)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        result.skipped(f"{model} {precision} {which}", f"{type(error).__name__}: {lines[0][:200]}")
        return
    result.add(model, result.compare(model, row))
