#!/usr/bin/env python3
"""Compares bitdial plan's formulas and simulation with a server under Poisson arrivals.

    .venv/bin/python scripts/plan_validation.py calibrate --model FOLDER
    .venv/bin/python scripts/plan_validation.py load 0.7 --model FOLDER
    .venv/bin/python scripts/plan_validation.py table

The server computes with one thread on one core and is loaded from another. ``calibrate`` measures its step
times and what HTTP adds; ``load`` offers a share of the simulated capacity in segments, measures step times
again between them, and compares; ``again`` computes plans and simulations anew. All keep their figures in
--out, from which ``table`` makes the table. Every prompt is another text, so that no prefix is cached. The
simulation gets the very arrivals of the run, formulas get their mean rate. The first tenth of a segment's
requests is left out everywhere.
"""

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plan_reality import arrivals_of, calibrated, pooled, reality

from server.host.cpu import cpu_name
from server.planning.calibration import Calibration
from server.planning.document import milliseconds
from server.planning.formulas import SteadyState
from server.planning.simulation import Simulated, Simulation, capacity
from server.planning.workload import Frontend, Objectives, Replica, Workload
from server.settings.model import ModelSettings
from server.tables import markdown_table

FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "goodput")
SEEDS = 9
LIMITS = Objectives(ttft_ms=500.0, itl_ms=40.0)
AIM = 0.15
_DRAWS, _BLOCK = 400, 25  # of the bootstrap: requests in blocks, since neighbours meet the same queue


def calibrate(options: argparse.Namespace, settings: ModelSettings) -> dict[str, Any]:
    """Step times on the server's core, and HTTP's with the client on the other."""
    found, frontend = asyncio.run(calibrated(options, settings))
    times = found.step_times()
    workload, replica = Workload(1.0, options.prompt, options.tokens), Replica(options.slots)
    return {
        "model": settings.model_id if settings.model_id == "bundled" else Path(settings.model_id).name,
        "precision": options.precision,
        "host": {"cpu": cpu_name(), "server_core": options.server_core, "client_core": options.client_core},
        "prompt": options.prompt,
        "tokens": options.tokens,
        "slots": options.slots,
        "limits": vars(LIMITS),
        "frontend": vars(frontend),
        "noise": dict(zip(("p50", "p90", "p99"), np.quantile(times.noise, (0.5, 0.9, 0.99)), strict=True)),
        "capacity": {
            "simulated": capacity(times, workload, replica, frontend),
            "formulas": SteadyState(times, workload, replica, frontend).capacity,
        },
        "calibration": found.as_dict(),
        "loads": {},
    }


def compare(options: argparse.Namespace, settings: ModelSettings, known: dict[str, Any]) -> dict[str, Any]:
    """One load in reality, then computed."""
    rate = options.share * known["capacity"]["simulated"]
    found = asyncio.run(reality(options, settings, rate))
    real = pooled(found.segments)
    load = {
        "rate": rate,
        "offered_seconds": options.seconds,
        "calibration": found.calibration.as_dict(),
        "drift": found.calibration.step_times().drift,
        "requests": len(real.requests),
        "errors": sum(one.refused for one in real.requests),
        "seconds": real.seconds,
        "cpus_of_others": found.cpus_of_others,
        "reality": figures(real),
        "interval": intervals(real),
    }
    return load | computed(load, known)


def computed(load: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Plan and simulation of a load, and how far the latter is from reality."""
    if "calibration" not in load:
        raise SystemExit("this load was not measured in segments: measure it again")
    times = Calibration.read(load["calibration"]).step_times()
    frontend, replica = Frontend(**known["frontend"]), Replica(known["slots"])
    segments = arrivals_of(load["rate"], load["offered_seconds"])
    met = sum(map(len, segments)) / sum(one[-1] for one in segments)
    workload = Workload(met, known["prompt"], known["tokens"])
    runs = []
    for seed in range(SEEDS):
        parts = [Simulation(times, workload, replica, frontend, seed=seed).run(one) for one in segments]
        runs.append(figures(pooled(parts)))
    simulated = {name: statistics.median(run[name] for run in runs) for name in FIGURES}
    planned = milliseconds(SteadyState(times, workload, replica, frontend).latencies())
    return {
        "plan": {name: planned[name] for name in FIGURES if name in planned},
        "simulation": simulated,
        "difference": {name: simulated[name] / value - 1 for name, value in load["reality"].items()},
    }


def figures(found: Simulated) -> dict[str, float]:
    named = milliseconds(found.latencies())
    return {**{name: named[name] for name in FIGURES if name in named}, "goodput": found.goodput(LIMITS)}


def intervals(real: Simulated) -> dict[str, list[float]]:
    """90 % intervals of reality's figures, by a block bootstrap over its requests."""
    random, requests = np.random.default_rng(3), real.requests
    drawn: list[dict[str, float]] = []
    for _ in range(_DRAWS):
        starts = random.integers(max(len(requests) - _BLOCK, 1), size=-(-len(requests) // _BLOCK))
        again = [one for start in starts for one in requests[start : start + _BLOCK]]
        drawn.append(figures(Simulated(again[: len(requests)], real.seconds)))
    return {
        name: [float(np.quantile([one[name] for one in drawn], q)) for q in (0.05, 0.95)] for name in FIGURES
    }


def table(known: dict[str, Any]) -> str:
    """Markdown; what is farther from reality than the aim is in bold."""
    heads = ["load", "figure", "plan", "simulation", "reality", "90 % interval", "simulation ÷ reality"]
    rows = [heads]
    for share, load in sorted(known["loads"].items()):
        for name in FIGURES:
            off = load["difference"][name]
            ratio = f"{1 + off:.2f}" if abs(off) <= AIM else f"**{1 + off:.2f}**"
            plan = f"{load['plan'][name]:.1f}" if name in load["plan"] else "–"
            low, high = load["interval"][name]
            shown = f"{load['simulation'][name]:.1f}", f"{load['reality'][name]:.1f}", f"{low:.1f}–{high:.1f}"
            label = name.removesuffix("_ms").replace("_", " ") + (", ms" if "_ms" in name else ", 1/s")
            rows.append([share, label, plan, *shown, ratio])
    return markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("action", choices=("calibrate", "load", "again", "table"))
    parser.add_argument("share", type=float, nargs="?", default=0.7, help="of the capacity")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--precision", default="dynamic-int8")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=120, help="of a load")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/plan-validation.json"))
    options = parser.parse_args()
    settings = ModelSettings(model_id=options.model, device="cpu", threads=1)
    known = json.loads(options.out.read_text()) if options.action != "calibrate" else {}
    if options.action == "calibrate":
        known = calibrate(options, settings)
    elif options.action == "again":
        for load in known["loads"].values():
            load |= computed(load, known)
    elif options.action == "load":
        known["loads"][f"{options.share:g}"] = compare(options, settings, known)
    options.out.write_text(json.dumps(known) + "\n")
    if known["loads"]:
        print(table(known))
    print({name: known[name] for name in ("capacity", "frontend", "noise")})


if __name__ == "__main__":
    main()
