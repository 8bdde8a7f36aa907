"""The requests of ``overload.py``, and what they were answered."""

import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil

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
