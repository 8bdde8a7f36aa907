"""The part of the benchmark over HTTP, as a table."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from server.bench.document import Report
from server.bench.errors import BenchError
from server.bench.http import checks
from server.bench.http.client import Client
from server.bench.http.load import Limits, Load, LoadFigures, Shape
from server.bench.http.own_server import own_server
from server.bench.http.texts import Texts
from server.bench.options import Options
from server.bench.table import PrintedTable
from server.settings.types import ALL
from server.tables import Column
from server.terminal import folded, say

_SHARES = (0.5, 0.8, 1.2)

Line = tuple[str | None, LoadFigures]
"""A precision, None for the server's default, and what was measured under one load."""
COLUMNS: list[Column[Line]] = [
    Column("precision", "", 13, lambda row: _name(row[0]), left=True),
    Column("load", "", 20, lambda row: _load(row[1]), left=True),
    Column("requests", "", 8, lambda row: str(row[1].requests)),
    Column("errors", "", 6, lambda row: str(sum(row[1].errors.values()))),
    Column("tok/s", "", 8, lambda row: f"{row[1].tokens_per_second:.1f}"),
    Column("req/s", "", 7, lambda row: f"{row[1].requests_per_second:.2f}"),
    Column("good/s", "", 7, lambda row: f"{row[1].goodput:.2f}"),
    Column("TTFT p50", "ms", 8, lambda row: f"{row[1].ttft_p50_ms:.1f}"),
    Column("TTFT p99", "ms", 8, lambda row: f"{row[1].ttft_p99_ms:.1f}"),
    Column("ITL p50", "ms", 8, lambda row: f"{row[1].inter_token_p50_ms:.2f}"),
    Column("ITL p99", "ms", 8, lambda row: f"{row[1].inter_token_p99_ms:.2f}"),
]
LEGEND = """\
streams      closed loop: every stream sends its next request when its last has ended
poisson      so many requests a second at random moments, whatever runs
tok/s        tokens of requests without error ÷ time from the first request to the last end; req/s alike
good/s       goodput: requests that met the limits (TTFT; mean time between their tokens) ÷ the same time
TTFT         at the client, from before connecting; ITL: time between a request's tokens
A client on the server's machine shares its CPUs: the figures are of both together."""


class Serving:
    """Loads an external server in each precision, or starts one per precision, one after another.

    Args:
        report: receives the figures, under ``http``.
    """

    def __init__(self, options: Options, report: Report) -> None:
        self._options, self._report = options, report
        self._limits = Limits(options.ttft_limit, options.gap_limit)

    def measure(self) -> None:
        """Raises: BenchError, if a server can't be started or a check's request fails."""
        self._table = PrintedTable(COLUMNS, 2, LEGEND)
        self._report.sections["http"] = []
        asyncio.run(self._all())
        self._table.end()

    async def _all(self) -> None:
        if self._options.server_url is not None:
            key = self._options.http_key
            client = Client(self._options.server_url, key.get_secret_value() if key else None)
            for name in self._names_elsewhere():
                await self._one(client, name)
            return
        slots = max(*self._options.stream_counts, checks.STREAMS + 1)
        for name in self._options.names():
            async with own_server(self._options, name, slots, self._report.host["threads"]) as client:
                await self._one(client, name)

    def _names_elsewhere(self) -> tuple[str | None, ...]:
        """Precisions of the external server; None is its default."""
        if self._options.precisions == ALL:
            raise BenchError("--precisions all: name them, since what that server can run isn't known here")
        return tuple(self._options.precisions or (None,))

    async def _one(self, client: Client, precision: str | None) -> None:
        found: dict[str, Any] = {"precision": precision, "loads": []}
        self._report.sections["http"].append(found)
        texts = Texts(client)
        shape = Shape(precision, self._options.prompt, self._options.tokens)
        async for figures in self._loads(Load(client, texts, shape, self._limits)):
            found["loads"].append(asdict(figures))
            self._table.add((precision, figures))
        if self._options.http_checks:
            found |= await _checks(client, texts, precision)

    async def _loads(self, load: Load) -> AsyncIterator[LoadFigures]:
        await load.closed_loop(1, 0)  # one request as warm-up
        capacity = 0.0
        for streams in self._options.stream_counts:
            figures = await load.closed_loop(streams, self._options.duration)
            capacity = figures.requests_per_second
            yield figures
        shares = [round(share * capacity, 2) for share in _SHARES]
        for rate in self._options.arrival_rates or filter(None, shares):
            yield await load.poisson(rate, self._options.duration)


async def _checks(client: Client, texts: Texts, precision: str | None) -> dict[str, Any]:
    first = await checks.first_token(client, texts, precision)
    say(
        folded(
            f"{_name(precision):<13}  a prompt of {first.prompt} tokens: TTFT {first.ttft_ms:.1f} ms, "
            f"prefill {first.prefill_ms:.1f} ms: {first.ratio:.2f} ×"
        )
    )
    long = await checks.long_prompt(client, texts, precision)
    say(
        folded(
            f"{_name(precision):<13}  a prompt of {long.prompt} tokens among {long.streams} streams "
            f"(first token after {long.long_ttft_ms:.0f} ms): their ITL p99 "
            f"{long.alone_p99_ms:.1f} → {long.beside_p99_ms:.1f} ms: {long.ratio:.2f} ×; "
            f"{long.meanwhile_p99_ms:.1f} ms while it was computed"
        )
    )
    return {
        "first_token": {**asdict(first), "ratio": first.ratio},
        "long_prompt": {**asdict(long), "ratio": long.ratio},
    }


def _load(row: LoadFigures) -> str:
    return f"{row.offered:g} streams" if row.kind == "closed loop" else f"poisson {row.offered:g}/s"


def _name(precision: str | None) -> str:
    return precision or "the default"
