"""A server of this project on the GPU under closed-loop load of growing concurrency."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from server.bench.gpu.speed import Subject

_NEEDED = ("fastapi", "uvicorn", "pydantic_settings", "fastapi_offline")


def missing() -> list[str]:
    """Packages that a server needs and this host lacks."""
    return [name for name in _NEEDED if find_spec(name) is None]


def measure(subject: Subject, source: str, precision: str, streams: Sequence[int], seconds: float) -> None:
    """Measures closed loops of each stream count on a server with default settings.

    Args:
        source: the server's ``model_id``.

    Raises:
        BenchError: the server did not become ready.
    """
    asyncio.run(_measure(subject, source, precision, streams, seconds))


async def _measure(
    subject: Subject, source: str, precision: str, streams: Sequence[int], seconds: float
) -> None:
    # imported here: the other parts work without the server's packages
    from server.bench.http.load import Limits, Load, Shape
    from server.bench.http.own_server import own_server
    from server.bench.http.section import COLUMNS
    from server.bench.http.texts import Texts
    from server.settings.server import ModelSettings
    from server.tables import Table

    plan, which = subject.plan, {"model": subject.model, "precision": precision}
    settings = ModelSettings(model_id=source, device=subject.spec.device)
    async with own_server(settings, precision, max(streams), plan.threads) as client:
        load = Load(client, Texts(client), Shape(precision, plan.prompt, plan.tokens), Limits(1000.0, 200.0))
        await load.closed_loop(1, 0)  # warm-up
        table = Table(COLUMNS, keys=2, width=None)
        print(f"\n{table.heading()}", flush=True)
        for count in streams:
            figures = await load.closed_loop(count, seconds)
            print(table.line((precision, figures)), flush=True)
            subject.result.note("http", {**which, **asdict(figures)})
        subject.result.note("stats", {**which, **await _stats(client, precision)})


async def _stats(client: Any, precision: str) -> dict[str, Any]:
    """The precision's and the host's figures in ``/stats`` after the load."""
    stats = await client.ask("GET", "/stats")
    one = stats["precisions"][precision]
    keep = ("memory", "details", "latency", "throughput")
    return {"host_memory": stats["host"]["memory"], **{key: one[key] for key in keep}}
