#!/usr/bin/env python3
"""What Ray Serve costs and gives on this host: one server against a fleet on Ray, in turns.

Writes a JSON file: overhead of a request and of a streamed token, throughput of one process and of two
replicas of one thread each, a replica killed under load, an update under load. It takes two cores.

.venv/bin/python scripts/ray_figures.py --out docs/results/cpu-ray-$(date +%F).json
"""

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.ray.traffic import Outcomes, clients  # noqa: E402

PROMPT = "The with statement"
SETTINGS = {"PRECISIONS": "fp32", "THREADS": "1", "DEVICE": "cpu", "LOG_LEVEL": "warning"}


@contextmanager
def one_server(environment: dict[str, str]) -> Iterator[str]:
    """``bitdial serve``; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            yield ready(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()


class RayFleet:
    """A cluster of Ray in processes of its own on this host."""

    def __init__(self, environment: dict[str, str], held: ExitStack) -> None:
        import ray
        from ray import serve

        os.environ.update(environment)
        port = free_port()
        temporary = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            _temp_dir=temporary,
        )
        held.callback(ray.shutdown)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        held.callback(serve.shutdown)
        self.address = f"http://127.0.0.1:{port}"

    def deploy(self, replicas: int, **settings: Any) -> float:
        """Deploys or changes the application; returns the seconds until it is ready."""
        from ray import serve

        from server.ray.deployments import Arguments, build
        from server.settings.server import Settings

        started = time.monotonic()
        serve.run(build(Arguments(replicas=replicas), Settings(**settings)))
        ready(self.address)
        return time.monotonic() - started

    def kill_one(self) -> None:
        """Ends a replica without notice."""
        import ray

        named = ray.util.list_named_actors(all_namespaces=True)
        names = sorted(one["name"] for one in named if "#fp32#" in one["name"])
        ray.kill(ray.get_actor(names[0], namespace="serve"))

    def replicas(self) -> int:
        return int(httpx.get(f"{self.address}/stats", timeout=60).json()["replicas"].get("fp32", 0))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ready(address: str) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return address
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{address} was not ready within two minutes")


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
        by_name["ratio"] = round(by_name["ray"] / by_name["plain"], 3)
    alone, streamed = found["101 tokens"], found["101 tokens streamed"]
    found["ms per request"] = round(found["1 token"]["ray"] - found["1 token"]["plain"], 3)
    extra = (streamed["ray"] - streamed["plain"]) - (alone["ray"] - alone["plain"])
    found["ms per streamed token"] = round(extra / 101, 4)
    return found


def tokens_per_second(address: str, count: int, seconds: float, tokens: int) -> float:
    """Generated tokens of finished requests per second, of clients that send one after another."""
    with clients(address, count, tokens) as outcomes:
        time.sleep(seconds / 4)  # all are under way
        before, started = outcomes.answered, time.monotonic()
        time.sleep(seconds)
        rate = (outcomes.answered - before) * tokens / (time.monotonic() - started)
    check(outcomes)
    return rate


def throughput(plain: str, fleet: str, rounds: int, seconds: float) -> dict[str, Any]:
    """One process of one thread against two replicas of one thread each, in turns."""
    found: dict[str, Any] = {}
    for count in (4, 16):
        rates: dict[str, list[float]] = {"plain": [], "ray": []}
        for _ in range(rounds):
            for name, address in (("plain", plain), ("ray", fleet)):
                rates[name].append(tokens_per_second(address, count, seconds, 200))
        medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
        ratios = [ray / one for ray, one in zip(rates["ray"], rates["plain"], strict=True)]
        found[f"{count} clients"] = {**medians, "ratio": round(statistics.median(ratios), 3)}
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


def measure(rounds: int, seconds: float, grpc: bool) -> dict[str, Any]:
    environment = {
        **SETTINGS,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": str(int(grpc)),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.ray.proxy.middlewares",
    }
    import ray

    with ExitStack() as held:
        plain = held.enter_context(one_server({**os.environ, **environment}))
        fleet = RayFleet(environment, held)
        start = fleet.deploy(2)
        return {
            "cores": os.cpu_count(),
            "ray": ray.__version__,
            "between processes": "gRPC" if grpc else "calls of actors",
            "model": "bundled",
            "seconds to deploy two replicas": round(start, 1),
            "overhead": overhead({"plain": plain, "ray": fleet.address}, rounds * 10),
            "throughput": throughput(plain, fleet.address, rounds, seconds),
            "a replica killed": kill(fleet),
            "an update": update(fleet),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement of throughput")
    parser.add_argument(
        "--grpc", action=argparse.BooleanOptionalAction, default=True, help="between Ray's processes"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.seconds, arguments.grpc)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
