"""The clients of ``scripts/soak.py``: regular, abusive and invalid requests, at random."""

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

PRECISIONS = ["fp32", "int8", "nf4", "dynamic-int8"]
COMING_AND_GOING = "bf16"
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
    """Clients that repeat random actions; ``outcomes`` counts (action, status)."""

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

    @property
    def actions(self) -> int:
        return sum(self.outcomes.values())

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
        fields = {"max_new_tokens": random.randint(1, 60), "precision": random.choice(PRECISIONS)}
        return {"inputs": prompt, **fields, **others}

    async def plain(self) -> int:
        return (await self.client.post("/generate", json=self.body())).status_code

    async def sampled(self) -> int:
        fields = self.body(do_sample=True, best_of=2, top_k=20, stop=["the", "é"], details=True)
        return (await self.client.post("/generate", json=fields)).status_code

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
            cut = leave_after is None and reply.status_code == 200 and '"details":{' not in last
            return "cut" if cut else reply.status_code

    async def leave_plain(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0.001, 0.1)):
                await self.client.post("/generate", json=self.body(max_new_tokens=LONG))
        return "left"

    async def openai(self) -> int:
        fields = {"prompt": [PROMPT, PROMPT * 3], "n": 2, "max_tokens": 10, "logprobs": 2, "echo": True}
        return (await self.client.post("/v1/completions", json=fields)).status_code

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
        """Unloads a precision while it generates, and disconnects one of its clients at the same time."""
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
        fields = {"precisions": random.sample(PRECISIONS, 2), "max_new_tokens": random.randint(1, 30)}
        if random.random() < 0.3:  # the client disconnects
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0.01, 0.3)):
                    await self.client.post("/compare", json={"inputs": PROMPT, **fields})
            return 200
        return (await self.client.post("/compare", json={"inputs": PROMPT, **fields})).status_code

    async def reset(self) -> str:
        """Resets the connection (RST) at a random moment of a request."""
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
        try:
            _, sink = await asyncio.open_connection(host, port)
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
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
        """The unexpected responses and their counts."""
        refusals = {400, 404, 413, 422}
        return {
            f"{action} {outcome}": count
            for (action, outcome), count in self.outcomes.items()
            # streams of a precision that is unloaded end with an error event
            if not (outcome in (200, 429, "left") or (action == "bad" and outcome in refusals))
        }
