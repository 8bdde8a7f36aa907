"""Threads that encode long texts: few at a time, first come, first served.

A tokenizer takes a second for half a million characters and can't be interrupted. With a thread for every
request a dozen long texts would take all cores, and each thread's heap (glibc has one for every thread)
would keep the memory of its longest text. They are daemon threads, so that the process can exit while a text
is being encoded.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from loaders import malloc
from server.concurrency import run_for_future

_THREADS = 2
_QUIET = 1.0  # seconds without work, after which memory goes back to the system
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Job:
    work: Callable[[], Any]
    result: "asyncio.Future[Any]"

    def run(self) -> None:
        if not self.result.cancelled():  # its client left, or its deadline passed, while it waited
            run_for_future(self.work, self.result)


class EncodingThreads:
    """Threads that start with the first jobs. ``run`` and ``close`` are called on the event loop."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started = 0

    async def run(self, work: Callable[[], _T]) -> _T:
        """The work's result. A job cancelled in the queue never runs; one cancelled later still finishes."""
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._jobs.put(job)
        if self._started < _THREADS:
            threading.Thread(target=self._serve, name=f"encoding-{self._started}", daemon=True).start()
            self._started += 1
        result: _T = await job.result
        return result

    def close(self) -> None:
        """Ends each thread after its current job."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _serve(self) -> None:
        untrimmed = False
        while True:
            try:
                job = self._jobs.get(timeout=_QUIET if untrimmed else None)
            except queue.Empty:
                malloc.trim()
                untrimmed = False
                continue
            if job is None:
                return
            job.run()
            del job  # or its text and tokens stay in memory until the next job
            untrimmed = True
