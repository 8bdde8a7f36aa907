#!/usr/bin/env python3
"""Measures a server under ten times its peak load: goodput, and the latency of refusals.

    .venv/bin/python scripts/overload.py [--seconds 15] [--tokens 32] [--factor 10]

Starts a server on one core and loads it from another. The peak: a closed loop of as many clients as there
are places. Then an open loop at ``factor`` times that rate on keep-alive connections; then a closed loop of
``factor`` times as many clients as places, each of which waits for ``Retry-After``. Then peak and open loop
again, with one connection per request. ``share`` is relative to the preceding peak; with ``--rounds``,
medians of the shares come last. Prints a table and one JSON line. Latencies count from the time a request was
due, so that they include the delay of a client that falls behind; ``lag`` is the delay of its event loop.
``by CPU`` is the share of the peak per CPU second of the server, which other work on this host affects less.

With a deadline, at one and a half times the load and with more places than can be served in time:

    .venv/bin/python scripts/overload.py --factor 1.5 --places 1000 -- --request-timeout 2
"""

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from overload_traffic import Load, Phase

PROMPT = "The with statement"
HEAD = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}"


async def measured(port: int, server: psutil.Process, options: argparse.Namespace) -> list[dict[str, Any]]:
    body = json.dumps({"inputs": PROMPT, "max_new_tokens": options.tokens, "ignore_eos": True})
    load = Load(port, HEAD.format(len(body), body).encode(), options.seconds, server)
    rows: list[dict[str, Any]] = []

    async def phase(running: Awaitable[Phase], peak: dict[str, Any] | None = None) -> dict[str, Any]:
        row: dict[str, Any] = {**(await running).row(), "rss_bytes": server.memory_info().rss}
        for share, of in (("share", "goodput"), ("share_by_cpu", "served_per_cpu_second")):
            row[share] = round(row[of] / (peak or row)[of], 3)
        rows.append(row)
        show(row)
        await asyncio.sleep(2)
        return row

    for _ in range(options.rounds):
        peak = await phase(load.closed("peak, kept connections", options.places))
        arriving = options.factor * peak["goodput"]
        await phase(load.open("open, kept connections", arriving, keep=True), peak)
        many = round(options.factor * options.places)
        await phase(load.closed("clients that wait and retry", many), peak)
        peak = await phase(load.closed("peak, a connection each", options.places, keep=False))
        await phase(load.open("open, a connection each", arriving, keep=False), peak)
    return rows


def summarise(rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["phase"] for row in rows):
        shares = sorted(row["share"] for row in rows if row["phase"] == name)
        by_cpu = statistics.median(row["share_by_cpu"] for row in rows if row["phase"] == name)
        print(
            f"{name:<29}share {statistics.median(shares):.2f} ({shares[0]:.2f}–{shares[-1]:.2f}), "
            f"by CPU {by_cpu:.2f}"
        )


def show(row: dict[str, Any]) -> None:
    refused, served, lag = (row[name] or {} for name in ("refused_ms", "served_ms", "lag_ms"))

    def three(found: dict[str, float]) -> str:
        return " / ".join(f"{found[q]:.0f}" for q in ("p50", "p90", "p99")) if found else "-"

    print(
        f"{row['phase']:<29}{row['asked_per_second']:>8.0f}{row['goodput']:>9.1f}"
        f"{row['share']:>7.2f}{row['share_by_cpu']:>7.2f}"
        f"{three(refused):>21}{three(served):>22}{three(lag):>14}   {row['statuses']}",
        flush=True,
    )


@contextmanager
def own_server(options: argparse.Namespace) -> Iterator[tuple[int, psutil.Process]]:
    """A server on its core; yields its port and process once it listens."""
    arguments = ["--port", "0", "--precisions", "fp32", "--threads", "1", *options.server]
    command = ["taskset", "-c", str(options.server_core), sys.executable, "-m", "server", "serve", *arguments]
    places = str(options.places)
    with open(options.log, "wb") if options.log else tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--max-concurrent-requests", places], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        announced = next(line for line in process.stdout if "listening" in line or "http://" in line)
        port = int(re.findall(r":(\d+)", announced)[-1])
        yield port, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=15, help="of every phase")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="generated by each request")
    parser.add_argument("--factor", type=float, default=10, help="load relative to the peak")
    parser.add_argument("--places", type=int, default=128)
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--log", help="a file for the server's log")
    parser.add_argument("server", nargs="*", help="further options of the server, after --")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.client_core})
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with own_server(options) as (port, server):
        print(
            f"{'phase':<29}{'asked/s':>8}{'served/s':>9}{'share':>7}{'by CPU':>7}{'refused, ms 50/90/99':>21}"
            f"{'served, ms 50/90/99':>22}{'lag, ms':>14}   statuses"
        )
        rows = asyncio.run(measured(port, server, options))
    if options.rounds > 1:
        summarise(rows)
    print(json.dumps({"factor": options.factor, "tokens": options.tokens, "phases": rows}))


if __name__ == "__main__":
    main()
