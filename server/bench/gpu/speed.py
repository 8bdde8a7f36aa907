"""Speed of a precision through its engine and of ``generate``, and device time of its steps."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.cuda.graph_runner import GraphRunner
from loaders.runner import DeviceRunner, ReportingRunner
from server.bench.bandwidth import MemorySpeed
from server.bench.gpu import rivals
from server.bench.gpu.kernels import StepCost, captured_step, replay_ms, step_costs
from server.bench.gpu.result import Result
from server.bench.session import Plan, Row, Session

STEADY = "bitdial, steady"
_MILLI = 1e3


@dataclass(frozen=True)
class Subject:
    """The measured model and the receiver of its figures."""

    model: str
    spec: ModelSpec
    plan: Plan
    speed: MemorySpeed
    result: Result


def measure(subject: Subject, precision: str) -> None:
    """Measures each batch with the smallest step that fits, in turn with ``generate``."""
    spec = replace(subject.spec, batch_invariant=False)
    others = [partial(rivals.generate, precision, spec)]
    asyncio.run(_session(subject, precision, spec, others, "bitdial").measure())


def measure_steady(subject: Subject, precision: str) -> None:
    """Measures a server's default: every step computes all slots."""
    spec = replace(subject.spec, batch_invariant=True)
    asyncio.run(_session(subject, precision, spec, [], STEADY).measure())


def _session(subject: Subject, precision: str, spec: ModelSpec, others: list[Any], name: str) -> Session:
    def show(row: Row) -> None:
        subject.result.add(subject.model, replace(row, engine=name) if row.engine == "bitdial" else row)

    return Session(
        plan=subject.plan,
        load=lambda: loaders.load(precision, spec),
        others=others,
        speed=subject.speed,
        progress=lambda *_: None,
        show=show,
        device=spec.device,
        inspect=partial(_inspect, subject, name),
    )


def _inspect(subject: Subject, name: str, loaded: LoadedModel) -> None:
    """Notes the precision's own report and its replay times against end-to-end step times."""
    runner, plan = loaded.runner, subject.plan
    found: dict[str, Any] = {
        "model": subject.model,
        "precision": loaded.precision,
        "engine": name,
        "load_seconds": loaded.load_seconds,
        "details": dict(loaded.details),
        "runner": dict(runner.report()) if isinstance(runner, ReportingRunner) else {},
        "weights_bytes": loaded.footprint.weights_bytes,
        "kv_cache_bytes": runner.kv_cache_bytes,
        "working_bytes": runner.working_bytes if isinstance(runner, DeviceRunner) else 0,
        "steps": [],
    }
    if isinstance(runner, GraphRunner):
        found["steps"] = [step for batch in plan.batches for step in _replayed(subject, name, loaded, batch)]
    subject.result.note("loaded", found)


def _replayed(subject: Subject, name: str, loaded: LoadedModel, batch: int) -> Iterator[dict[str, Any]]:
    """Replay time of a step against its end-to-end time."""
    assert isinstance(loaded.runner, GraphRunner)
    plan = subject.plan
    step = captured_step(loaded.runner, batch, plan.prompt + plan.tokens)
    row = subject.result.ours(subject.model, loaded.precision, batch, name)
    took = replay_ms(step.replay) if step is not None else None
    if took is None or row is None:
        return
    whole = _end_to_end_ms(row)
    print(f"  a step of {batch} rows: {whole:.3f} ms end to end, {took:.3f} ms replayed", flush=True)
    yield {"batch": batch, "replay_ms": took, "end_to_end_ms": whole, "share_of_replay": took / whole}


def measure_kernels(subject: Subject, precision: str, process: Executor) -> None:
    """Measures kernel times of the captured steps of the measured sizes.

    Args:
        process: runs the profiler, which would slow down later launches of this process.
    """
    spec, plan = replace(subject.spec, batch_invariant=False), subject.plan
    costs = process.submit(step_costs, precision, spec, plan.batches, plan.prompt + plan.tokens).result()
    if not costs:
        subject.result.skipped(f"kernels {precision}", "its steps are not captured")
    for batch, cost in costs.items():
        _note_kernels(subject, precision, batch, cost)


def _note_kernels(subject: Subject, precision: str, batch: int, cost: StepCost) -> None:
    row = subject.result.ours(subject.model, precision, batch)
    found: dict[str, Any] = {"model": subject.model, "precision": precision, "batch": batch, **asdict(cost)}
    if row is not None and cost.kernels:
        whole = _end_to_end_ms(row)
        found |= {"end_to_end_ms": whole, "share_of_kernels": cost.kernel_ms / whole}
    share = found.get("share_of_kernels", float("nan"))
    print(
        f"{precision:<5} a step of {batch:>2} rows: {cost.kernels} kernels, "
        f"{cost.kernel_ms:.3f} ms together, {share:.0%} of it end to end",
        flush=True,
    )
    subject.result.note("kernels", found)


def _end_to_end_ms(row: Row) -> float:
    """Time of a step including sampling, host and waiting: rows ÷ decode rate."""
    return _MILLI * row.batch / row.figures.decode_tokens_per_second
