"""A server of this project on the card, loaded over HTTP by more and more streams."""

import asyncio
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from loaders.base import ModelSpec
from server.bench.gpu.result import Result
from server.bench.session import Plan

_NEEDED = ("fastapi", "uvicorn", "pydantic_settings", "fastapi_offline")


def missing() -> list[str]:
    """Packages that a server needs and this host lacks."""
    return [name for name in _NEEDED if find_spec(name) is None]


def measure(
    result: Result, model: str, source: str, spec: ModelSpec, plan: Plan, precision: str, seconds: float
) -> None:
    """Closed loops of as many streams as the plan has rows, each for so many seconds.

    Raises:
        BenchError: the server did not become ready.
    """
    asyncio.run(_measure(result, model, source, spec, plan, precision, seconds))


async def _measure(
    result: Result, model: str, source: str, spec: ModelSpec, plan: Plan, precision: str, seconds: float
) -> None:
    # here: on a host without the server's packages all else can be measured
    from server.bench.serving.load import Limits, Load, Shape
    from server.bench.serving.own_server import own_server
    from server.bench.serving.section import HEADING, line
    from server.bench.serving.texts import Texts
    from server.settings import ModelSettings

    settings = ModelSettings(model_id=source, device=spec.device)
    async with own_server(settings, precision, max(plan.batches), plan.threads) as client:
        load = Load(client, Texts(client), Shape(precision, plan.prompt, plan.tokens), Limits(1000.0, 200.0))
        await load.closed_loop(1, 0)  # the first pays for what only it needs
        print(f"\n{HEADING}", flush=True)
        for streams in plan.batches:
            figures = await load.closed_loop(streams, seconds)
            print(line(precision, figures), flush=True)
            result.note("http", {"model": model, "precision": precision, **asdict(figures)})
        result.note("stats", {"model": model, "precision": precision, **await _told(client, precision)})


async def _told(client: Any, precision: str) -> dict[str, Any]:
    """What ``/stats`` says of the precision and of the card after the load."""
    stats = await client.ask("GET", "/stats")
    one = stats["precisions"][precision]
    keep = ("memory", "details", "latency", "throughput")
    return {"host_memory": stats["host"]["memory"], **{key: one[key] for key in keep}}
