#!/usr/bin/env python3
"""Runs mixed traffic with disconnects, resets, unloads, comparisons and bad input, and checks for leaks.

    .venv/bin/python scripts/soak.py [--minutes 60] [--model bundled] [--clients 24]

Starts a server and measures its resources when it is idle: after a warm-up of many actions, in which every
slot of every precision has been full, several times during the run, and at the end. Prints a table and one
JSON line last; exits with 1 if memory, open files or threads grew, if a place or a sequence was taken while
idle, or after an unexpected response. Ten minutes (``--minutes 10``) are enough to find a leaked place.
"""

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import httpx
import psutil
from soak_traffic import COMING_AND_GOING, PRECISIONS, PROMPT, Traffic
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SHADOW = ["--shadow-precision", "fp32", "--shadow-fraction", "1"]
TAKEN = ("places", "sequences")  # zero whenever the server is idle
ALLOWED = {
    "rss_bytes": 32 * 2**20,  # fluctuation of the allocator
    "open_files": 2,  # connections that are being closed
    "threads": 2,  # of asyncio's default executor, which starts them on demand, up to CPUs + 4
}
WARM_UP_ACTIONS = 20_000  # after which the allocator's arenas are as large as the traffic makes them
PARTS = 6  # resources are measured after each


@asynccontextmanager
async def served(model: str) -> AsyncIterator[tuple[psutil.Popen, httpx.AsyncClient]]:
    """Yields a listening server and a client for it."""
    names = ",".join(PRECISIONS)
    process = psutil.Popen(
        [sys.executable, "-m", "server", "serve", *SHADOW,
         "--model", model, "--port", "0", "--precisions", names],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = (re.search(r"listening on (http://\S+)", line) for line in process.stdout)
        address = next(match[1] for match in found if match)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            yield process, client
    finally:
        process.terminate()
        process.wait()


async def warm_up(client: httpx.AsyncClient) -> None:
    """Fills every slot of every precision once, because pages of a KV cache are committed when written."""
    context = (await client.get("/info")).json()["max_total_tokens"]
    half = context // 2
    body = {"prompt": [1] * half, "max_tokens": context - half, "ignore_eos": True, "temperature": 0}
    for precision in [*PRECISIONS, COMING_AND_GOING]:
        wanted = [client.post("/v1/completions", json={**body, "precision": precision}) for _ in range(16)]
        assert {reply.status_code for reply in await asyncio.gather(*wanted)} == {200}
    # starts the threads that encode long texts, whose number is bounded
    await asyncio.gather(*(client.post("/tokenize", json={"inputs": PROMPT * 10_000}) for _ in range(8)))
    await client.post(f"/precisions/{COMING_AND_GOING}/unload")


async def at_rest(process: psutil.Popen, client: httpx.AsyncClient) -> dict[str, int]:
    """The server's resources while it is idle."""
    await client.post(f"/precisions/{COMING_AND_GOING}/unload")
    queue: dict[str, int] = {}
    for _ in range(600):  # the shadow first replays the finished requests
        stats = (await client.get("/stats")).json()
        queue = stats["queue"]
        if not queue["running"] + queue["waiting"] + queue["in_flight"] + stats["shadow"]["waiting"]:
            break
        await asyncio.sleep(0.1)
    files = []
    for _ in range(5):  # the minimum excludes connections that are being closed
        await asyncio.sleep(1)
        files.append(process.num_fds())
    return {
        "rss_bytes": process.memory_info().rss,
        "open_files": min(files),
        "threads": process.num_threads(),
        "places": queue["in_flight"],
        "sequences": queue["running"] + queue["waiting"],
    }


async def soak(process: psutil.Popen, client: httpx.AsyncClient, seconds: float, clients: int) -> int:
    traffic = Traffic(client)
    await warm_up(client)
    while traffic.actions < WARM_UP_ACTIONS:
        await asyncio.gather(*(traffic.run(time.monotonic() + 5) for _ in range(clients)))
    held = [await at_rest(process, client)]
    for _ in tqdm(range(PARTS), desc="soaking", unit="part"):
        until = time.monotonic() + seconds / PARTS
        await asyncio.gather(*(traffic.run(until) for _ in range(clients)))
        held.append(await at_rest(process, client))
    return report(held, traffic, seconds)


def report(held: list[dict[str, int]], traffic: Traffic, seconds: float) -> int:
    grew = [name for name in held[0] if _growth(held, name) > ALLOWED.get(name, 0)]
    grew += [name for name in TAKEN if name not in grew and any(one[name] for one in held)]
    for name in held[0]:
        figures = "".join(f"{one[name]:>14,}" for one in held)
        print(f"{name:<12}{figures}{'  grew' if name in grew else ''}")
    print(f"\n{traffic.actions} actions, {WARM_UP_ACTIONS} of them and more before {seconds / 60:g} minutes")
    for (action, outcome), count in sorted(traffic.outcomes.items(), key=str):
        print(f"{action:<14}{outcome!s:<20}{count:>8}")
    unwanted = traffic.unwanted()
    print(json.dumps({"held": held, "grew": grew, "unwanted": unwanted, "seconds": seconds}))
    return 1 if grew or unwanted else 0


def _growth(held: list[dict[str, int]], name: str) -> float:
    """Between the medians of both halves: what is leaked stays, a single measurement fluctuates."""
    half = len(held) // 2
    first, second = ([one[name] for one in part] for part in (held[:half], held[-half:]))
    return median(second) - median(first)


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--clients", type=int, default=24)
    options = parser.parse_args()
    async with served(options.model) as (process, client):
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.1)
        try:
            return await soak(process, client, options.minutes * 60, options.clients)
        except httpx.ConnectError:
            print(f"the server exited unexpectedly, with code {process.poll()}")
            return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: ends the server too
    sys.exit(asyncio.run(main()))
