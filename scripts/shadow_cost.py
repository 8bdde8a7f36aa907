#!/usr/bin/env python3
"""Measures what a shadow costs the traffic that it replays: the same arrivals with and without it in turn.

    .venv/bin/python scripts/shadow_cost.py [--rate 3] [--seconds 8] [--turns 5]

Every turn starts new servers, because two servers with the same settings differ by more than a shadow costs.
For the same reason a server that replays nothing (a fraction of 0) is compared with one without a shadow:
their difference is the noise. Prints percentiles over all turns; one JSON line last.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from server.bench.figures import MILLISECONDS, percentile
from server.bench.http.client import Answer, Client
from server.bench.http.own_server import own_server
from server.bench.http.texts import Texts
from server.settings.server import ModelSettings

REFERENCE = "fp32"
SERVERS: dict[str, dict[str, str]] = {
    "no shadow": {},
    "replays none": {"SHADOW_PRECISION": REFERENCE, "SHADOW_FRACTION": "0"},
    "replays all": {"SHADOW_PRECISION": REFERENCE, "SHADOW_FRACTION": "1"},
}


@asynccontextmanager
async def served(options: argparse.Namespace, environment: dict[str, str]) -> AsyncIterator[Client]:
    """A server with these additional settings; every server has both precisions loaded."""
    os.environ.update(environment)
    try:
        server = own_server(ModelSettings(model_id=options.model), options.precision, 16, options.threads)
        async with server as client:
            for name in environment:
                del os.environ[name]
            loaded = await client.stream("The", 2, REFERENCE)
            assert not loaded.error, loaded.error
            yield client
    finally:
        for name in environment:
            os.environ.pop(name, None)


async def load(client: Client, texts: list[str], options: argparse.Namespace, turn: int) -> list[Answer]:
    """Poisson arrivals, the same for the same turn."""
    random, started, moment = Random(turn), time.perf_counter(), 0.0
    sending: list[asyncio.Task[Answer]] = []
    while moment < options.seconds:
        await asyncio.sleep(max(started + moment - time.perf_counter(), 0))
        text = texts[len(sending) % len(texts)]
        sending.append(asyncio.create_task(client.stream(text, options.tokens, options.precision)))
        moment += random.expovariate(options.rate)
    answers = await asyncio.gather(*sending)
    assert not any(answer.error for answer in answers), "a request failed"
    return answers


def figures(answers: list[Answer]) -> dict[str, float]:
    gaps = [gap for answer in answers for gap in answer.gaps]
    prefill = [answer.last["timings"]["prefill_ms"] / MILLISECONDS for answer in answers]
    values = {"ttft": [answer.ttft for answer in answers], "prefill": prefill, "between tokens": gaps}
    return {
        f"{name} p{round(100 * share)}": MILLISECONDS * percentile(of, share)
        for name, of in values.items()
        for share in (0.5, 0.9, 0.99)
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--precision", default="nf4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3, help="requests a second")
    parser.add_argument("--seconds", type=float, default=8, help="of a turn")
    parser.add_argument("--turns", type=int, default=5, help="of each")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    answers: dict[str, list[Answer]] = {name: [] for name in SERVERS}
    medians: dict[str, list[float]] = {name: [] for name in SERVERS}
    replayed = 0
    for turn in tqdm(range(options.turns), desc=f"{options.rate:g} a second"):
        for name in SERVERS if turn % 2 == 0 else reversed(SERVERS):
            async with served(options, SERVERS[name]) as client:
                texts = await Texts(client).get(16, options.prompt)
                await load(client, texts, argparse.Namespace(**{**vars(options), "seconds": 1}), 0)
                found = await load(client, texts, options, turn)
                shadow = (await client.ask("GET", "/stats"))["shadow"] or {"precisions": {}}
            answers[name] += found
            medians[name].append(round(MILLISECONDS * percentile([one.ttft for one in found], 0.5), 1))
            counted = shadow["precisions"].get(options.precision)
            replayed += counted["requests"]["compared"] if counted else 0
    table = [{"server": name, "requests": len(some), **figures(some)} for name, some in answers.items()]
    for row in table:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    print(f"median time to first token of each turn, ms: {medians}; {replayed} replayed")
    print(json.dumps({"figures": table, "medians": medians, "replayed": replayed}))


if __name__ == "__main__":
    asyncio.run(main())
