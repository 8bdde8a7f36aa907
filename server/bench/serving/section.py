"""The part of the measurement that goes over HTTP, for one precision, as a table."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from server.bench.options import Options
from server.bench.report import Report
from server.bench.serving import checks
from server.bench.serving.client import Client
from server.bench.serving.load import Limits, Load, LoadFigures, Shape
from server.bench.serving.own_server import own_server
from server.bench.serving.texts import Texts

_SHARES = (0.5, 0.8, 1.2)
_UNKNOWN = "–"

HEADING = (
    f"{'precision':<13}  {'load':<22} {'requests':>8} {'errors':>6}  {'tok/s':>8}  "
    f"{'req/s':>7} {'good/s':>7}  "
    f"{'TTFT p50':>8} {'p99':>8}  {'ITL p50':>8} {'p99':>8}   (times in ms)"
)
LEGEND = """\
streams      closed loop: every stream sends its next request when its last has ended
poisson      so many requests a second at random moments, whatever runs
tok/s        tokens of requests without error ÷ time from the first request to the last end; req/s alike
good/s       goodput: requests that met the limits (TTFT; mean time between their tokens) ÷ the same time
TTFT         at the client, from before connecting; ITL: time between a request's tokens
A client on the server's machine shares its CPUs: the figures are of both together."""


class Serving:
    """Loads a server in each precision: somebody's, or one of its own for each, one after another.

    Args:
        report: takes the figures, under ``http``.
    """

    def __init__(self, options: Options, report: Report) -> None:
        self._options, self._report = options, report
        self._limits = Limits(options.ttft_limit, options.gap_limit)

    def measure(self) -> None:
        """Raises: BenchError, where a server can't be had or a check's request fails."""
        print(f"{HEADING}\n{'─' * len(HEADING)}", flush=True)
        self._report.sections["http"] = []
        asyncio.run(self._all())
        print(f"\n{LEGEND}\n", flush=True)

    async def _all(self) -> None:
        if self._options.server_url is not None:
            key = self._options.http_key
            client = Client(self._options.server_url, key.get_secret_value() if key else None)
            for name in self._options.precisions or (None,):  # None: the server's default
                await self._one(client, name)
            return
        slots = max(*self._options.stream_counts, checks.STREAMS + 1)
        for name in self._options.names():
            async with own_server(self._options, name, slots, self._report.host["threads"]) as client:
                await self._one(client, name)

    async def _one(self, client: Client, precision: str | None) -> None:
        found: dict[str, Any] = {"precision": precision, "loads": []}
        self._report.sections["http"].append(found)
        texts = Texts(client)
        shape = Shape(precision, self._options.prompt, self._options.tokens)
        async for figures in self._loads(Load(client, texts, shape, self._limits)):
            found["loads"].append(asdict(figures))
            print(line(precision, figures), flush=True)
        if self._options.http_checks:
            found |= await _checks(client, texts, precision)

    async def _loads(self, load: Load) -> AsyncIterator[LoadFigures]:
        await load.closed_loop(1, 0)  # one request: the first pays for what only it needs
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
    print(
        f"{_name(precision)}  a prompt of {first.prompt} tokens: TTFT {first.ttft_ms:.1f} ms, prefill "
        f"{first.prefill_ms:.1f} ms: {first.ratio:.2f} ×",
        flush=True,
    )
    long = await checks.long_prompt(client, texts, precision)
    print(
        f"{_name(precision)}  a prompt of {long.prompt} tokens among {long.streams} streams "
        f"(first token after {long.long_ttft_ms:.0f} ms): their ITL p99 "
        f"{long.alone_p99_ms:.1f} → {long.beside_p99_ms:.1f} ms: {long.ratio:.2f} ×; "
        f"{long.meanwhile_p99_ms:.1f} ms while it was computed",
        flush=True,
    )
    return {
        "first_token": {**asdict(first), "ratio": first.ratio},
        "long_prompt": {**asdict(long), "ratio": long.ratio},
    }


def line(precision: str | None, row: LoadFigures) -> str:
    kind = f"{row.offered:g} streams" if row.kind == "closed loop" else f"poisson {row.offered:g}/s"
    return (
        f"{_name(precision)}  {kind:<22} {row.requests:>8} {sum(row.errors.values()):>6}  "
        f"{row.tokens_per_second:>8.1f}  {row.requests_per_second:>7.2f} {row.goodput:>7.2f}  "
        f"{row.ttft_p50_ms:>8.1f} {row.ttft_p99_ms:>8.1f}  {row.inter_token_p50_ms:>8.2f} "
        f"{row.inter_token_p99_ms:>8.2f}"
    )


def _name(precision: str | None) -> str:
    return f"{precision or 'the default':<13}"
