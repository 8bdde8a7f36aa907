#!/usr/bin/env python3
"""Measures what slow readers of /tokenize and far too long prompts cost a server and its other clients.

    .venv/bin/python scripts/long_texts.py [--model bundled] [--readers 12] [--seconds 30] [--megabytes 1.9]

Starts a server on the last CPU (by taskset) and runs on the first. Prints each figure as it is measured,
and one JSON line last; no figure makes it fail.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The quick brown fox jumps over the lazy dog; 3.14 and so on. "
GRACE = 2
MIB = 2**20
Reader = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Watched:
    """A server and its measured figures."""

    def __init__(self, process: psutil.Popen, client: httpx.AsyncClient) -> None:
        self.process, self.client = process, client
        self.figures: dict[str, Any] = {}

    def report(self, name: str, value: Any) -> None:
        self.figures[name] = value
        print(f"{name:<45}{value}", flush=True)

    def rss(self) -> int:
        return int(self.process.memory_info().rss) // MIB

    async def peak_rss(self, until: asyncio.Event) -> int:
        highest = 0
        while not until.is_set():
            highest = max(highest, self.rss())
            await asyncio.sleep(0.05)
        return highest

    async def in_flight(self) -> int:
        count: int = (await self.client.get("/stats")).json()["queue"]["in_flight"]
        return count


@asynccontextmanager
async def served(model: str) -> AsyncIterator[Watched]:
    command = [sys.executable, "-m", "server", "serve", "--model", model, "--port", "0"]
    command += ["--precisions", "fp32", "--graceful-termination-timeout", str(GRACE)]
    if shutil.which("taskset") and (cpus := sorted(os.sched_getaffinity(0)))[1:]:
        command = ["taskset", "-c", str(cpus[-1]), *command]
        os.sched_setaffinity(0, {cpus[0]})
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = (re.search(r"listening on (http://\S+)", line) for line in process.stdout)
        address = next(match[1] for match in found if match)
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            while (await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.1)
            yield Watched(process, client)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()


def request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def reader(client: httpx.AsyncClient, sent: bytes) -> Reader:
    source, sink = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=4096)
    sink.write(sent)
    return source, sink


async def read_slowly(connection: Reader, seconds: float) -> None:
    """8 kB a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and await connection[0].read(1024):
        await asyncio.sleep(0.125)


async def short_requests(client: httpx.AsyncClient, until: asyncio.Event) -> list[float]:
    """Milliseconds of small requests, one after another."""
    took = []
    while not until.is_set():
        began = time.perf_counter()
        await client.post("/generate", json={"inputs": "The", "max_new_tokens": 4})
        took.append(1000 * (time.perf_counter() - began))
        await asyncio.sleep(0.02)
    return took


async def others_during(watched: Watched, name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Runs the work; reports its CPU time and memory, and the latency of other requests meanwhile."""
    over = asyncio.Event()
    watched.report(f"{name}: RSS before, MiB", watched.rss())
    others = asyncio.create_task(short_requests(watched.client, over))
    peak = asyncio.create_task(watched.peak_rss(over))
    before = sum(watched.process.cpu_times()[:2])
    await work()
    watched.report(f"{name}: CPU, s", round(sum(watched.process.cpu_times()[:2]) - before, 2))
    over.set()
    cuts = quantiles(await others, n=100)
    watched.report(f"{name}: others' p50 and p99, ms", (round(cuts[49], 1), round(cuts[98], 1)))
    watched.report(f"{name}: RSS at its peak, MiB", await peak)
    while await watched.in_flight():
        await asyncio.sleep(0.1)
    await asyncio.sleep(5)
    watched.report(f"{name}: RSS 5 s after the last place, MiB", watched.rss())


async def long_prompts(watched: Watched, text: str) -> None:
    async def work() -> None:
        async def post(path: str, body: dict[str, Any]) -> tuple[int, float]:
            began = time.perf_counter()
            status = (await watched.client.post(path, json=body)).status_code
            return status, time.perf_counter() - began

        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/generate", {"inputs": text}),
            ("/v1/completions", {"prompt": [text]}),
        ]
        bodies += [("/compare", {"inputs": text}), ("/generate", {"inputs": text, "truncate": 8})]
        for path, body in bodies:
            status, took = await post(path, body)
            label = f"one prompt to {path}{' with truncate' if 'truncate' in body else ''}: status, s"
            watched.report(label, (status, round(took, 3)))
        answers = await asyncio.gather(*(post(*bodies[i % 2]) for i in range(8)))
        watched.report("8 prompts at once: statuses", dict(Counter(status for status, _ in answers)))
        watched.report("8 prompts at once: slowest, s", round(max(took for _, took in answers), 3))

    await others_during(watched, "prompts", work)


async def slow_readers(watched: Watched, text: str, count: int, seconds: float) -> None:
    sent = request("/tokenize", {"inputs": text})
    label = f"{len(text):,} characters"

    async def work() -> None:
        connections = [await reader(watched.client, sent) for _ in range(count)]
        reading = [asyncio.create_task(read_slowly(one, seconds)) for one in connections]
        await asyncio.sleep(2)
        watched.report(f"{label}: places taken after 2 s", await watched.in_flight())
        await asyncio.gather(*reading)
        for _, sink in connections:
            sink.transport.abort()
        left = time.perf_counter()
        while await watched.in_flight():
            await asyncio.sleep(0.05)
        watched.report(f"{label}: time until the places are free, s", round(time.perf_counter() - left, 2))

    await others_during(watched, label, work)


async def terminate(watched: Watched, texts: list[str], count: int) -> None:
    connections = [
        await reader(watched.client, request("/tokenize", {"inputs": text}))
        for text in texts
        for _ in range(count)
    ]
    await asyncio.sleep(3)
    began = time.perf_counter()
    watched.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(watched.process.wait)
    watched.report(f"SIGTERM with grace {GRACE} s: code, s", (code, round(time.perf_counter() - began, 2)))
    for _, sink in connections:
        sink.transport.abort()


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--readers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--megabytes", type=float, default=1.9)
    options = parser.parse_args()
    large = (TEXT * (int(options.megabytes * 1e6) // len(TEXT) + 1))[: int(options.megabytes * 1e6)]
    async with served(options.model) as watched:
        await long_prompts(watched, large)
        for text in (large, large[:240_000]):
            await slow_readers(watched, text, options.readers, options.seconds)
        await terminate(watched, [large, large[:240_000]], options.readers // 2)
        print(json.dumps(watched.figures))


if __name__ == "__main__":
    asyncio.run(main())
