#!/usr/bin/env python3
"""Mixed traffic with disconnects, resets, unloads, comparisons, bad input: does anything grow, or stay taken?

    .venv/bin/python scripts/soak.py [--minutes 60] [--model bundled] [--clients 24]

Starts a server of its own. What it holds is looked at in its rests: after a warm-up in which every slot
of every precision has been full once, on the way, and at the end. Prints a table, and one JSON line last;
exits with 1 if memory, open files or threads grew, a place or a sequence was taken in any rest, or an answer
came that should not. Ten minutes (``--minutes 10``) are enough to find a place that is lost.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ["fp32", "int8", "nf4", "dynamic-int8"]
COMING_AND_GOING = "bf16"
SHADOW = ["--shadow-precision", "fp32", "--shadow-fraction", "1"]
TAKEN = ("places", "sequences")  # none in any rest
ALLOWED = {"rss_bytes": 32 * 2**20}  # what an allocator may hold at one time and not at another
PARTS = 6  # after each, what is held is looked at
LONG = 400
PROMPT = "The with statement "
BAD: list[tuple[str, bytes]] = [
    ("/generate", b""),
    ("/generate", b"{"),
    ("/generate", b"[" * 100_000),
    ("/generate", b'{"inputs": "\xff"}'),
    ("/generate", b'{"inputs": "x", "temperature": NaN}'),
    ("/generate", b'{"inputs": "x", "max_new_tokens": -1}'),
    ("/generate", b'{"inputs": "x", "precision": "int3"}'),
    ("/generate", json.dumps({"inputs": "x " * 20_000}).encode()),
    ("/generate_stream", b'{"inputs": "x", "best_of": 3, "do_sample": true}'),
    ("/v1/completions", json.dumps({"prompt": ["x"] * 100_000}).encode()),
    ("/v1/completions", b'{"prompt": [999999]}'),
    ("/v1/completions", b'{"model": "../x", "prompt": "x"}'),
    ("/generate", b"x" * 2_100_000),
    ("/nothing", b"{}"),
]


class Traffic:
    """Clients that do something at random, again and again; ``outcomes`` counts (action, status)."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.outcomes: Counter[tuple[str, int | str]] = Counter()
        self._actions: list[tuple[Callable[[], Awaitable[int | str]], int]] = [
            (self.plain, 30),
            (self.sampled, 10),
            (self.stream, 20),
            (self.leave_stream, 10),
            (self.leave_plain, 10),
            (self.openai, 10),
            (self.bad, 15),
            (self.look, 5),
            (self.come_and_go, 1),
            (self.unload_under_way, 2),
            (self.compare, 2),
            (self.reset, 25),
            (self.long_texts, 4),
        ]

    async def run(self, until: float) -> None:
        actions, weights = zip(*self._actions, strict=True)
        while time.monotonic() < until:
            action = random.choices(actions, weights)[0]
            try:
                outcome = await action()
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self.outcomes[action.__name__, outcome] += 1
            if outcome == 429:
                await asyncio.sleep(0.05)

    @staticmethod
    def body(**others: Any) -> dict[str, Any]:
        prompt = PROMPT * random.randint(1, 20)
        wishes = {"max_new_tokens": random.randint(1, 60), "precision": random.choice(PRECISIONS)}
        return {"inputs": prompt, **wishes, **others}

    async def plain(self) -> int:
        return (await self.client.post("/generate", json=self.body())).status_code

    async def sampled(self) -> int:
        wishes = self.body(do_sample=True, best_of=2, top_k=20, stop=["the", "é"], details=True)
        return (await self.client.post("/generate", json=wishes)).status_code

    async def stream(self) -> int | str:
        return await self._stream(leave_after=None)

    async def leave_stream(self) -> int | str:
        return await self._stream(leave_after=random.randint(0, 5))

    async def _stream(self, leave_after: int | None) -> int | str:
        async with self.client.stream("POST", "/generate_stream", json=self.body()) as reply:
            last, seen = "", 0
            async for line in reply.aiter_lines():
                last, seen = line or last, seen + 1
                if leave_after is not None and seen > leave_after:
                    return reply.status_code
            cut = leave_after is None and reply.status_code == 200 and '"details": {' not in last
            return "cut" if cut else reply.status_code

    async def leave_plain(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0.001, 0.1)):
                await self.client.post("/generate", json=self.body(max_new_tokens=LONG))
        return "left"

    async def openai(self) -> int:
        wishes = {"prompt": [PROMPT, PROMPT * 3], "n": 2, "max_tokens": 10, "logprobs": 2, "echo": True}
        return (await self.client.post("/v1/completions", json=wishes)).status_code

    async def bad(self) -> int:
        path, body = random.choice(BAD)
        headers = {"content-type": "application/json"}
        return (await self.client.post(path, content=body, headers=headers)).status_code

    async def look(self) -> int:
        path = random.choice(["/stats", "/metrics", "/health", "/precisions", "/v1/models", "/docs"])
        return (await self.client.get(path)).status_code

    async def come_and_go(self) -> int:
        await self.client.post(f"/precisions/{COMING_AND_GOING}/load")
        await self.client.post("/generate", json=self.body(precision=COMING_AND_GOING))
        return (await self.client.post(f"/precisions/{COMING_AND_GOING}/unload")).status_code

    async def unload_under_way(self) -> int:
        """Ends the generations of a precision while they run; a client leaves at that very time."""
        body = self.body(precision=COMING_AND_GOING, max_new_tokens=LONG)
        several = {"prompt": [PROMPT] * 3, "n": 2, "max_tokens": LONG, "precision": COMING_AND_GOING}
        calls = [("/generate", body), ("/generate_stream", body), ("/v1/completions", several)]
        calls.append(("/v1/completions", {**several, "stream": True}))
        asked = [asyncio.create_task(self.client.post(path, json=sent)) for path, sent in calls]
        await asyncio.sleep(random.uniform(0.05, 0.5))
        unloading = asyncio.create_task(self.client.post(f"/precisions/{COMING_AND_GOING}/unload"))
        await asyncio.sleep(random.uniform(0, 0.02))
        random.choice(asked).cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        return (await unloading).status_code

    async def compare(self) -> int:
        wishes = {"precisions": random.sample(PRECISIONS, 2), "max_new_tokens": random.randint(1, 30)}
        if random.random() < 0.3:  # it leaves
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0.01, 0.3)):
                    await self.client.post("/compare", json={"inputs": PROMPT, **wishes})
            return 200
        return (await self.client.post("/compare", json={"inputs": PROMPT, **wishes})).status_code

    async def reset(self) -> str:
        """Ends the connection at any moment of a request, without the usual goodbye."""
        path, body = random.choice([
            ("/generate", self.body(max_new_tokens=LONG)),
            ("/generate", self.body(precision=COMING_AND_GOING)),
            ("/generate_stream", self.body(max_new_tokens=LONG)),
            ("/v1/completions", {"prompt": [PROMPT] * 4, "n": 2, "stream": True, "max_tokens": LONG}),
            ("/v1/completions", {"prompt": [PROMPT] * 4, "max_tokens": LONG}),
            ("/compare", {"inputs": PROMPT, "precisions": PRECISIONS, "max_new_tokens": 20}),
            ("/tokenize", {"inputs": PROMPT * 5000}),
            (f"/precisions/{COMING_AND_GOING}/load", {}),
        ])  # fmt: skip
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        host, port = self.client.base_url.host, self.client.base_url.port
        _, sink = await asyncio.open_connection(host, port)
        sink.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await asyncio.sleep(random.choice([0.0, 0.001, 0.01, 0.1, 0.5]) * random.random())
        found: socket.socket = sink.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sink.transport.abort()
        return "left"

    async def long_texts(self) -> int:
        text = PROMPT * random.choice([500, 5000])
        body = {"inputs": text, "truncate": 8, "max_new_tokens": 2}
        path = random.choice(["/tokenize", "/generate"])
        sent = {"inputs": text} if path == "/tokenize" else body
        return (await self.client.post(path, json=sent)).status_code

    def unwanted(self) -> dict[str, int]:
        """Answers that no action should have had."""
        refusals = {400, 404, 413, 422}
        return {
            f"{action} {outcome}": count
            for (action, outcome), count in self.outcomes.items()
            # a precision that comes and goes is gone for some, and its last words are an error
            if not (outcome in (200, 429, "left") or (action == "bad" and outcome in refusals))
        }


@asynccontextmanager
async def served(model: str) -> AsyncIterator[tuple[psutil.Popen, httpx.AsyncClient]]:
    """A server of its own, ready."""
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
    """Every slot of every precision full once: the pages of the KV caches are taken as they are written."""
    context = (await client.get("/info")).json()["max_total_tokens"]
    half = context // 2
    body = {"prompt": [1] * half, "max_tokens": context - half, "ignore_eos": True, "temperature": 0}
    for precision in [*PRECISIONS, COMING_AND_GOING]:
        wanted = [client.post("/v1/completions", json={**body, "precision": precision}) for _ in range(16)]
        assert {reply.status_code for reply in await asyncio.gather(*wanted)} == {200}
    # long texts are encoded in threads, of which there come to be only so many
    await asyncio.gather(*(client.post("/tokenize", json={"inputs": PROMPT * 10_000}) for _ in range(8)))
    await client.post(f"/precisions/{COMING_AND_GOING}/unload")


async def at_rest(process: psutil.Popen, client: httpx.AsyncClient) -> dict[str, int]:
    """What the server holds when nothing is asked of it."""
    await client.post(f"/precisions/{COMING_AND_GOING}/unload")
    queue: dict[str, int] = {}
    for _ in range(600):  # what was finished is replayed first, by its shadow
        stats = (await client.get("/stats")).json()
        queue = stats["queue"]
        if not queue["running"] + queue["waiting"] + queue["in_flight"] + stats["shadow"]["waiting"]:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)
    return {
        "rss_bytes": process.memory_info().rss,
        "open_files": process.num_fds(),
        "threads": process.num_threads(),
        "places": queue["in_flight"],
        "sequences": queue["running"] + queue["waiting"],
    }


async def soak(process: psutil.Popen, client: httpx.AsyncClient, seconds: float, clients: int) -> int:
    traffic = Traffic(client)
    await warm_up(client)
    await asyncio.gather(*(traffic.run(time.monotonic() + min(20, seconds / 4)) for _ in range(clients)))
    held = [await at_rest(process, client)]
    for _ in tqdm(range(PARTS), desc="soaking", unit="part"):
        until = time.monotonic() + seconds / PARTS
        await asyncio.gather(*(traffic.run(until) for _ in range(clients)))
        held.append(await at_rest(process, client))
    return report(held, traffic, seconds)


def report(held: list[dict[str, int]], traffic: Traffic, seconds: float) -> int:
    start, end = held[0], held[-1]
    grew = [name for name in start if end[name] > start[name] + ALLOWED.get(name, 0)]
    grew += [name for name in TAKEN if name not in grew and any(one[name] for one in held)]
    for name in start:
        figures = "".join(f"{one[name]:>14,}" for one in held)
        print(f"{name:<12}{figures}{'  grew' if name in grew else ''}")
    print(f"\n{sum(traffic.outcomes.values())} actions in {seconds / 60:g} minutes")
    for (action, outcome), count in sorted(traffic.outcomes.items(), key=str):
        print(f"{action:<14}{outcome!s:<20}{count:>8}")
    unwanted = traffic.unwanted()
    print(json.dumps({"held": held, "grew": grew, "unwanted": unwanted, "seconds": seconds}))
    return 1 if grew or unwanted else 0


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
            print(f"the server ended by itself, with code {process.poll()}")
            return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does: the server ends too
    sys.exit(asyncio.run(main()))
