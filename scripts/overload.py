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
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

PROMPT = "The with statement"
HEAD = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}"
LENGTH, RETRY = re.compile(rb"content-length: (\d+)", re.I), re.compile(rb"retry-after: (\d+)", re.I)
CLOSING = re.compile(rb"connection: close", re.I)
TICK = 0.005
WARM_UP = 2.0  # seconds of every phase that are not counted


@dataclass
class Answer:
    """One response; status 0 if the connection closed without one."""

    status: int
    seconds: float
    retry_after: float = 0.0


@dataclass
class Phase:
    """The responses and figures of one phase."""

    name: str
    begun: float = field(default_factory=time.perf_counter)
    answers: list[Answer] = field(default_factory=list)
    asked: int = 0
    lags: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the server process."""

    def row(self) -> dict[str, object]:
        counts = Counter(answer.status for answer in self.answers)
        refused = [one.seconds for one in self.answers if one.status in (429, 503)]
        served = [one.seconds for one in self.answers if one.status == 200]
        return {
            "phase": self.name,
            "seconds": round(self.seconds, 2),
            "asked_per_second": round(self.asked / self.seconds, 1),
            "goodput": round(counts[200] / self.seconds, 2),
            "served_per_cpu_second": round(counts[200] / max(self.cpu_seconds, 1e-9), 2),
            "statuses": {str(status): count for status, count in sorted(counts.items())},
            "refused_ms": percentiles(refused),
            "served_ms": percentiles(served),
            "lag_ms": percentiles(self.lags),
        }


def percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{q}": round(ordered[len(ordered) * q // 100] * 1000, 2) for q in (50, 90, 99)}


class Connection(asyncio.Protocol):
    """Sends one encoded request at a time and finds the end of its response."""

    def __init__(self, request: bytes) -> None:
        self._request, self._received = request, b""
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[bytes] | None = None
        self.reusable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def send(self) -> bytes:
        """The head of the response; empty if there was none."""
        assert self._transport is not None
        self._received, self._answered = b"", asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        return await self._answered

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head) if end else None
        if length is not None and len(body) >= int(length[1]):
            self.reusable = CLOSING.search(head) is None
            self._settle(head)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._settle(b"")

    def _settle(self, head: bytes) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(head)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


class Load:
    """Sends the same request to one server repeatedly."""

    def __init__(self, port: int, request: bytes, seconds: float, server: psutil.Process) -> None:
        self._port, self._request, self._seconds, self._server = port, request, seconds, server
        self._idle: list[Connection] = []

    async def _exchange(self, phase: Phase, due: float, keep: bool) -> Answer:
        phase.asked += time.perf_counter() >= phase.begun + WARM_UP
        head = b""
        try:
            connection = await self._connection(keep)
            head = await connection.send()
            if keep and connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
        except OSError:
            pass
        now, retry = time.perf_counter(), RETRY.search(head)
        answer = Answer(int(head[9:12]) if head else 0, now - due, float(retry[1]) if retry else 0.0)
        if phase.begun + WARM_UP <= now <= phase.begun + WARM_UP + self._seconds:
            phase.answers.append(answer)
        return answer

    async def _connection(self, keep: bool) -> Connection:
        while keep and self._idle:
            if (kept := self._idle.pop()).reusable:
                return kept
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(lambda: Connection(self._request), "127.0.0.1", self._port)
        return made

    async def closed(self, name: str, clients: int, keep: bool = True) -> Phase:
        """Each client sends its next request after a response, or after its ``Retry-After``."""

        async def client() -> None:
            while (now := time.perf_counter()) < end:
                answer = await self._exchange(phase, now, keep)
                pause = answer.retry_after if answer.status != 200 else 0.0
                await asyncio.sleep(min(pause, max(0.0, end - time.perf_counter())))

        phase = Phase(name)
        end = phase.begun + WARM_UP + self._seconds
        asked = [asyncio.ensure_future(client()) for _ in range(clients)]
        await self._watch(phase)
        await self._end(phase, *asked)
        return phase

    async def open(self, name: str, per_second: float, keep: bool) -> Phase:
        """Requests are sent at a fixed rate, independent of responses."""
        phase, tasks = Phase(name), list[asyncio.Task[Answer]]()
        watch = asyncio.ensure_future(self._watch(phase))
        while (gone := time.perf_counter() - phase.begun) < WARM_UP + self._seconds:
            while len(tasks) < gone * per_second:
                due = phase.begun + len(tasks) / per_second
                tasks.append(asyncio.ensure_future(self._exchange(phase, due, keep)))
            await asyncio.sleep(0.001)
        await watch
        await self._end(phase, *tasks)
        return phase

    async def _watch(self, phase: Phase) -> None:
        """Wakes every ``TICK`` seconds and records its delay."""
        await asyncio.sleep(WARM_UP)
        used = self._cpu_seconds()
        while (now := time.perf_counter()) < phase.begun + WARM_UP + self._seconds:
            await asyncio.sleep(TICK)
            phase.lags.append(time.perf_counter() - now - TICK)
        phase.cpu_seconds = self._cpu_seconds() - used

    def _cpu_seconds(self) -> float:
        times = self._server.cpu_times()
        return float(times.user + times.system)

    async def _end(self, phase: Phase, *tasks: asyncio.Future[Any]) -> None:
        phase.seconds = self._seconds
        _, late = await asyncio.wait(tasks, timeout=30)
        for task in late:
            task.cancel()
        while self._idle:
            self._idle.pop().close()


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
