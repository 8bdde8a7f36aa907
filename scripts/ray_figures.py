#!/usr/bin/env python3
"""What Ray Serve costs and gives on this host: one server against a fleet on Ray, in turns.

Writes a JSON file: overhead of a request and of a streamed token, throughput of one process and of two
replicas of one thread each, a replica killed under load, an update under load. It takes two cores.

.venv/bin/python scripts/ray_figures.py --out docs/results/cpu-ray-$(date +%F).json
"""

import argparse
import json
import os
import re
import secrets
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ray_servers import RayFleet, one_server  # noqa: E402

from tests.ray.traffic import Outcomes, clients  # noqa: E402

PROMPT = "The with statement"
ONE, TWO, FLEET = "one process, one thread", "one process, two threads", "two replicas, one thread each"
SETTINGS = {"DEVICE": "cpu", "LOG_LEVEL": "warning"}


def milliseconds(client: httpx.Client, tokens: int, stream: bool) -> float:
    """The time of one request."""
    body = {"inputs": PROMPT, "max_new_tokens": tokens, "ignore_eos": True, "stream": stream}
    started = time.perf_counter()
    with client.stream("POST", "/generate", json=body) as response:
        for _ in response.iter_raw():
            pass
    assert response.status_code == 200
    return (time.perf_counter() - started) * 1000


def overhead(addresses: dict[str, str], rounds: int) -> dict[str, Any]:
    """Medians of single requests, one server and the fleet in turns."""
    kinds = {"1 token": (1, False), "101 tokens": (101, False), "101 tokens streamed": (101, True)}
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in addresses} for kind in kinds}
    with ExitStack() as held:
        opened = {
            name: held.enter_context(httpx.Client(base_url=address, timeout=60))
            for name, address in addresses.items()
        }
        for number in range(rounds + 3):
            for kind, (tokens, stream) in kinds.items():
                for name, client in opened.items():
                    taken = milliseconds(client, tokens, stream)
                    if number >= 3:  # the first warm up
                        times[kind][name].append(taken)
    found: dict[str, Any] = {
        kind: {name: round(statistics.median(values), 3) for name, values in by_name.items()}
        for kind, by_name in times.items()
    }
    for by_name in found.values():
        by_name["ratio"] = round(by_name[FLEET] / by_name[ONE], 3)
    alone, streamed = found["101 tokens"], found["101 tokens streamed"]
    found["ms per request"] = round(found["1 token"][FLEET] - found["1 token"][ONE], 3)
    extra = (streamed[FLEET] - streamed[ONE]) - (alone[FLEET] - alone[ONE])
    found["ms per streamed token"] = round(extra / 101, 4)
    return found


def generated(address: str) -> float:
    """The tokens that a server has generated."""
    text = httpx.get(f"{address}/metrics", timeout=60).text
    return sum(float(value) for value in re.findall(r"^bitdial_generated_tokens_total.* (.+)$", text, re.M))


def tokens_per_second(address: str, count: int, seconds: float, tokens: int) -> float:
    """Tokens generated per second for clients that send one request after another."""
    with clients(address, count, tokens) as outcomes:
        time.sleep(seconds / 4)  # all are under way
        before, started = generated(address), time.monotonic()
        time.sleep(seconds)
        rate = (generated(address) - before) / (time.monotonic() - started)
    check(outcomes)
    return rate


def throughput(addresses: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each server, in turns, and the fleet's relative to the others' of its turn."""
    found: dict[str, Any] = {}
    for count in (4, 16):
        rates: dict[str, list[float]] = {name: [] for name in addresses}
        for _ in range(arguments.rounds):
            for name, address in addresses.items():
                rates[name].append(tokens_per_second(address, count, arguments.seconds, arguments.tokens))
        found[f"{count} clients"] = {
            **{name: round(statistics.median(values), 1) for name, values in rates.items()},
            "ratios": {
                name: round(statistics.median([a / b for a, b in zip(rates[FLEET], values, strict=True)]), 3)
                for name, values in rates.items()
                if name != FLEET
            },
        }
    return found


def check(outcomes: Outcomes) -> None:
    if outcomes.refused or outcomes.broken:
        raise RuntimeError(f"requests failed: {[*outcomes.refused, *outcomes.broken][:3]}")


def kill(fleet: RayFleet) -> dict[str, Any]:
    """One of two replicas ended under load."""
    with clients(fleet.address, 8, 100) as outcomes:
        time.sleep(5)
        before = outcomes.answered
        killed = time.monotonic()
        fleet.kill_one()
        while fleet.replicas() != 1 and time.monotonic() < killed + 10:
            time.sleep(0.1)
        while fleet.replicas() < 2 and time.monotonic() < killed + 120:
            time.sleep(0.1)
        back = time.monotonic() - killed
        time.sleep(3)
    return {"answered before": before, "seconds until two serve": round(back, 1), **outcomes.figures()}


def update(fleet: RayFleet) -> dict[str, Any]:
    """Both replicas replaced under load."""
    with clients(fleet.address, 4, 100) as outcomes:
        time.sleep(3)
        seconds = fleet.deploy(2, max_best_of=3)
        time.sleep(3)
    return {"seconds": round(seconds, 1), **outcomes.figures()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    environment = {
        **SETTINGS,
        "MODEL_ID": arguments.model,
        "PRECISION": arguments.precision,
        "PRECISIONS": arguments.precision,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": str(int(arguments.grpc)),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.ray.proxy.middlewares",
    }
    import ray

    with ExitStack() as held:
        one, two = (
            held.enter_context(one_server({**os.environ, **environment, "THREADS": threads}))
            for threads in ("1", "2")
        )
        fleet = RayFleet({**environment, "THREADS": "1"}, arguments.precision, held)
        found: dict[str, Any] = {
            "cores": os.cpu_count(),
            "ray": ray.__version__,
            "between processes": "gRPC" if arguments.grpc else "calls of actors",
            "model": Path(arguments.model).name,
            "precision": arguments.precision,
            "seconds to deploy two replicas": round(fleet.deploy(2), 1),
        }
        servers = {ONE: one, FLEET: fleet.address}
        if arguments.overhead:
            found["overhead"] = overhead(servers, arguments.rounds * 10)
        found["throughput"] = throughput({**servers, TWO: two}, arguments)
        if arguments.faults:
            found |= {"a replica killed": kill(fleet), "an update": update(fleet)}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement of throughput")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--tokens", type=int, default=100, help="of a request of the throughput")
    parser.add_argument("--grpc", action=switch, default=True, help="between Ray's processes")
    parser.add_argument("--overhead", action=switch, default=True, help="also time single requests")
    parser.add_argument("--faults", action=switch, default=True, help="also end and update replicas")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
