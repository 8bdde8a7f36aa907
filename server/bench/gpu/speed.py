"""The speed of a precision through its engine, beside ``generate``; and what its steps cost the card."""

import asyncio
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import loaders
from loaders.base import DeviceRunner, LoadedModel, ModelSpec, ReportingRunner
from loaders.captured_runner import CapturedRunner
from server.bench.gpu import rivals
from server.bench.gpu.kernels import StepCost, step_cost
from server.bench.gpu.result import Result
from server.bench.host import MemorySpeed
from server.bench.session import Plan, Row, Session

STEADY = "bitdial, steady"
_MILLI = 1e3


@dataclass(frozen=True)
class Subject:
    """What is measured, and where what is found goes."""

    model: str
    spec: ModelSpec
    plan: Plan
    speed: MemorySpeed
    result: Result


def measure(subject: Subject, precision: str) -> None:
    """Each batch by the smallest step that fits, which is the fastest; ``generate`` in turn with it."""
    spec = replace(subject.spec, batch_invariant=False)
    others = [partial(rivals.generate, precision, spec)]
    asyncio.run(_session(subject, precision, spec, others, "bitdial").measure())


def measure_steady(subject: Subject, precision: str) -> None:
    """As the server is set by default: every step computes all slots."""
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
    """What the precision tells of itself, and the cost of its steps beside what came out end to end."""
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
    if isinstance(runner, CapturedRunner):
        for batch in plan.batches:
            cost = step_cost(runner, batch, plan.prompt + plan.tokens)
            row = subject.result.ours(subject.model, loaded.precision, batch, name)
            if cost is not None and cost.kernels and row is not None:
                found["steps"].append(_shares(batch, cost, row))
    print("\n".join(map(_line, found["steps"])), flush=True)
    subject.result.note("loaded", found)


def _line(step: dict[str, Any]) -> str:
    return (
        f"  a step of {step['batch']} rows: {step['end_to_end_ms']:.3f} ms end to end, "
        f"{step['kernels']} kernels of {step['kernel_ms']:.3f} ms together ({step['share_of_kernels']:.0%}), "
        f"replayed in {step['replay_ms']:.3f} ms"
    )


def _shares(batch: int, cost: StepCost, row: Row) -> dict[str, Any]:
    """A step from end to end is the batch ÷ the decode rate: host, sampling and waiting included."""
    step_ms = _MILLI * batch / row.figures.decode_tokens_per_second
    return {
        "batch": batch,
        **asdict(cost),
        "end_to_end_ms": step_ms,
        "share_of_kernels": cost.kernel_ms / step_ms,
    }
