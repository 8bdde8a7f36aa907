"""Device time of a step: of a replay by CUDA events, and the sum of its kernels' times."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import loaders
from loaders.base import ModelSpec
from loaders.cuda import buckets
from loaders.cuda.cuda_graphs import Replay
from loaders.cuda.graph_runner import GraphRunner

_REPEAT = 20
_MICRO = 1e-3  # of a millisecond


@dataclass(frozen=True)
class Captured:
    """A captured decode step."""

    rows: int
    columns: int
    replay: Replay


@dataclass(frozen=True)
class KernelCost:
    """Kernel time of a call."""

    kernels: int
    """Kernels and copies; 0 if the profiler has no permission."""
    kernel_ms: float
    """The sum of their times, a lower bound of the step's."""


@dataclass(frozen=True)
class StepCost(KernelCost):
    """Kernel time of a captured step."""

    rows: int
    columns: int


def step_costs(precision: str, spec: ModelSpec, batches: Sequence[int], tokens: int) -> dict[int, StepCost]:
    """Costs of a precision's captured steps by batch size; empty if nothing was captured.

    Args:
        tokens: maximum tokens of a row.
    """
    loaded = loaders.load(precision, spec)
    try:
        runner, found = loaded.runner, {}
        if isinstance(runner, GraphRunner):
            runner.prefill(0, [0])  # captures
            for batch in batches:
                if (step := captured_step(runner, batch, tokens)) is not None:
                    cost = kernel_cost(step.replay, spec.device)
                    found[batch] = StepCost(cost.kernels, cost.kernel_ms, step.rows, step.columns)
        return found
    finally:
        loaded.close()


def captured_step(runner: GraphRunner, rows: int, tokens: int) -> Captured | None:
    """
    Args:
        rows: of the step; the smallest captured size that fits is returned.
        tokens: maximum tokens of a row.

    Returns: None if nothing was captured.
    """
    steps = runner.captured_steps
    sizes = sorted({key[1] for key in steps if key[0] == "decode"})
    if not sizes:
        return None
    size = buckets.smallest(sizes, rows)
    columns = buckets.smallest(buckets.contexts(runner.context), tokens)
    return Captured(size, columns, steps["decode", size, columns])


def replay_ms(replay: Replay) -> float | None:
    """Mean time of a replay, gaps between kernels included; None without a GPU."""
    replay()
    if not torch.cuda.is_available():
        return None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_REPEAT):
        replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / _REPEAT


def kernel_cost(work: Callable[[], object], device: str) -> KernelCost:
    """Measures with torch's profiler, which slows down later launches of the process."""
    # keeps CUPTI set up: initializing it again crashes if graphs were captured in between
    os.environ["TEARDOWN_CUPTI"], os.environ["DISABLE_CUPTI_LAZY_REINIT"] = "0", "1"
    on_card = device == "cuda"
    work()
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as found:
        for _ in range(_REPEAT):
            work()
        if on_card:
            torch.cuda.synchronize()
    events: list[Any] = list(found.key_averages())
    seen = [event for event in events if event.device_type.name == ("CUDA" if on_card else "CPU")]
    micro = sum(e.self_device_time_total if on_card else e.self_cpu_time_total for e in seen)
    return KernelCost(round(sum(event.count for event in seen) / _REPEAT), micro * _MICRO / _REPEAT)
