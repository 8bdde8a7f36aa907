"""What a step costs on the device itself: the sum of its kernels' times, and a replay from end to end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loaders import buckets
from loaders.captured_runner import CapturedRunner

_REPEAT = 20
_MICRO = 1e-3  # of a millisecond


@dataclass(frozen=True)
class StepCost:
    """Of one decode step of so many rows that look at so many columns of the cache."""

    rows: int
    columns: int
    kernels: int
    """Kernels and copies of a step; 0 where the profiler is not allowed to see any."""
    kernel_ms: float
    """The sum of their times: a replay can't be faster."""
    replay_ms: float | None
    """A replay among others, on the device's own clock; None without a device."""


def step_cost(runner: CapturedRunner, rows: int, tokens: int) -> StepCost | None:
    """
    Args:
        rows: of the step; one that was captured for them is taken.
        tokens: that each row holds at most.

    Returns: None where the runner has no captured step.
    """
    steps = runner.captured_steps
    sizes = sorted({key[1] for key in steps if key[0] == "decode"})
    if not sizes:
        return None
    size = buckets.smallest(sizes, rows)
    columns = buckets.smallest(buckets.contexts(runner.context), tokens)
    return cost_of(steps["decode", size, columns], size, columns, runner.module.device.type)


def cost_of(replay: Callable[[], object], rows: int, columns: int, device: str) -> StepCost:
    """What a call costs, measured over several."""
    replay()
    kernels, kernel_ms = _profiled(replay, device)
    return StepCost(rows, columns, kernels, kernel_ms, _timed(replay) if device == "cuda" else None)


def _profiled(work: Callable[[], object], device: str) -> tuple[int, float]:
    """How many kernels a call has, and milliseconds that they take together."""
    on_card = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as found:
        for _ in range(_REPEAT):
            work()
        if on_card:
            torch.cuda.synchronize()
    events: list[Any] = list(found.key_averages())
    seen = [event for event in events if event.device_type.name == ("CUDA" if on_card else "CPU")]
    micro = sum(e.self_device_time_total if on_card else e.self_cpu_time_total for e in seen)
    return round(sum(event.count for event in seen) / _REPEAT), micro * _MICRO / _REPEAT


def _timed(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_REPEAT):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / _REPEAT
