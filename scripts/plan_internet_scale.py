#!/usr/bin/env python3
"""A day of ten thousand replicas: diurnal traffic, failures and an outage, by policy of the router.

    .venv/bin/python scripts/plan_internet_scale.py --out docs/results/plan-internet-scale-2026-11-29 \\
        --calibration docs/results/plan-validation-2026-11-29.json

The replica's step times are measured ones; the event simulation of the real scheduler reduces them to
rates and latencies by number of requests; a lumped Markov chain computes the fleet. First the chain is
compared with the event simulation of a small fleet. Traffic and failures are assumptions, and written out.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
from plan_scale_document import document, plot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from server.planning.aggregate import Aggregate, aggregate
from server.planning.calibration import Calibration
from server.planning.document import milliseconds
from server.planning.fleet import Faults, Fleet, Window
from server.planning.simulation import WARM_UP, Policy, Simulation, capacity, poisson
from server.planning.step_times import StepTimes
from server.planning.workload import Frontend, Replica, Workload

DAY, HOUR, WINDOW = 86400.0, 3600.0, 600.0
POLICIES: tuple[Policy, ...] = get_args(Policy)
LOADS = (0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97, 1.05)  # of the runs that a replica is reduced from
CHECKED = (0.6, 0.8, 0.9)
TICK = 0.03  # seconds
RUNS = 10  # of the chain, for what one run of the events shows


class Traffic:
    """Requests a second: a day's wave, and a factor that is drawn anew each minute.

    Args:
        peak: the largest mean, at 20:00; the smallest, at 08:00, is a third of it.
        spread: coefficient of variation of the minutes' factors (gamma distributed).
    """

    ratio = 3.0

    def __init__(self, peak: float, spread: float, seed: int) -> None:
        self.peak, self._low = peak, peak / self.ratio
        shape = 1 / spread**2
        self._minutes = np.random.default_rng(seed).gamma(shape, 1 / shape, math.ceil(DAY / 60) + 1)

    def mean(self, now: float) -> float:
        wave = (1 + math.cos(2 * math.pi * (now / HOUR - 20) / 24)) / 2
        return self._low + (self.peak - self._low) * wave

    def __call__(self, now: float) -> float:
        return float(self.mean(now) * self._minutes[max(int(now / 60), 0)])


def reduced(
    times: StepTimes, workload: Workload, replica: Replica, frontend: Frontend, most: float
) -> Aggregate:
    runs = [
        Simulation(times, workload.at(load * most), replica, frontend, seed=seed).run(
            poisson(load * most, 3000, seed)
        )
        for seed, load in enumerate(LOADS)
    ]
    return aggregate(runs, replica.slots, replica.places + 1)


def check(
    times: StepTimes, workload: Workload, replica: Replica, frontend: Frontend, most: float, one: Aggregate
) -> list[dict[str, Any]]:
    """The chain beside the event simulation, on a fleet that both can compute."""
    found, replicas, seconds = [], 16, 100.0
    for policy in POLICIES:
        for load in CHECKED:
            rate = load * most * replicas
            arrivals = poisson(rate, round(rate * seconds), seed=5)
            events = Simulation(times, workload.at(rate), replica, frontend, replicas, policy).run(arrivals)
            window = chained(one, replicas, replica.places, policy, rate, seconds)
            simulated, chain = milliseconds(events.latencies()), milliseconds(window.latencies(one))
            found.append({"policy": policy, "load": load, "events": simulated, "chain": chain})
    return found


def chained(
    one: Aggregate, replicas: int, places: int, policy: Policy, rate: float, seconds: float
) -> Window:
    """What so many seconds from an empty fleet show, less the first tenth, over several runs."""
    total = Window(0.0, 0.0, found=np.zeros(one.levels, dtype=np.int64), occupied=np.zeros(one.levels))
    for seed in range(RUNS):
        fleet = Fleet(one, replicas, places, policy, tick=TICK, seed=seed)
        first = WARM_UP * seconds
        fleet.run(lambda now: rate, first, first)
        (window,) = fleet.run(lambda now: rate, seconds - first, seconds - first)
        total.seconds += window.seconds
        total.arrivals += window.arrivals
        total.refused += window.refused
        total.found += window.found
        total.occupied += window.occupied
    return total


def day(
    one: Aggregate, traffic: Traffic, options: argparse.Namespace, faults: Faults | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for policy in POLICIES:
        begun = time.perf_counter()
        fleet = Fleet(one, options.replicas, options.places, policy, faults, TICK)
        fleet.run(traffic, 120, 120, start=-120)
        windows = fleet.run(traffic, DAY, WINDOW)
        found[policy] = {
            "windows": [figures(window, one) for window in windows],
            "retried": sum(window.retried for window in windows),
            "refused": sum(window.refused for window in windows),
            "requests": sum(window.arrivals for window in windows),
            "computed_in_seconds": round(time.perf_counter() - begun, 1),
        }
    return found


def figures(window: Window, one: Aggregate) -> dict[str, Any]:
    return {
        "hour": window.start / HOUR,
        "arrivals_per_second": window.arrivals / window.seconds,
        "serving": window.serving,
        "retried": window.retried,
        **milliseconds(window.latencies(one)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--calibration", type=Path, required=True, help="of scripts/plan_validation.py")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--replicas", type=int, default=10_000)
    parser.add_argument("--places", type=int, default=128)
    parser.add_argument("--peak-load", type=float, default=0.85, help="of the capacity, at 20:00")
    parser.add_argument("--minute-spread", type=float, default=0.05)
    parser.add_argument("--days-between-failures", type=float, default=10, help="of one replica")
    parser.add_argument("--restart-seconds", type=float, default=120)
    parser.add_argument("--outage-share", type=float, default=0.1, help="of the replicas, at 20:30")
    options = parser.parse_args()
    known = json.loads(options.calibration.read_text())
    times = Calibration.read(known["calibration"]).step_times()
    workload, frontend = Workload(1.0, known["prompt"], known["tokens"]), Frontend(**known["frontend"])
    replica = Replica(known["slots"], places=options.places)
    most = capacity(times, workload, replica, frontend)
    one = reduced(times, workload, replica, frontend, most)
    traffic = Traffic(options.peak_load * most * options.replicas, options.minute_spread, seed=3)
    outage = (20.5 * HOUR, options.outage_share)
    faults = Faults(options.days_between_failures * DAY, options.restart_seconds, (outage,))
    result = {
        "replica": {
            **{name: known[name] for name in ("model", "precision", "slots", "prompt", "tokens")},
            "capacity": most,
            "ends_per_second": one.rates[:20].tolist(),
        },
        "assumptions": {
            **{name: value for name, value in vars(options).items() if isinstance(value, int | float)},
            "peak_per_second": traffic.peak,
            "peak_to_trough": traffic.ratio,
            "faults": asdict(faults),
        },
        "check": check(times, workload, replica, frontend, most, one),
        "day": day(one, traffic, options, faults),
        "plot": options.out.with_suffix(".svg").name,
    }
    options.out.with_suffix(".json").write_text(json.dumps(result) + "\n")
    options.out.with_suffix(".md").write_text(document(result))
    plot(result, options.out.with_suffix(".svg"))
    print(document(result))


if __name__ == "__main__":
    main()
