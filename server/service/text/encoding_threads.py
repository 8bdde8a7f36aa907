"""Threads on which long texts are encoded: few at a time, first come, first served.

A tokenizer takes a second for half a million characters and can't be interrupted. With a thread for every
request a dozen long texts would take all cores, and each thread's heap (glibc has one for every thread)
would keep what it once needed. These are daemon threads: the end of the process doesn't wait for a text
that is being encoded for a client who may have gone.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from loaders import malloc as heap
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
    """Started when first needed. ``run`` and ``close`` are called on the event loop."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started = 0

    async def run(self, work: Callable[[], _T]) -> _T:
        """The work's result. Cancelled while it waits, it is never done; later, its result is dropped."""
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._jobs.put(job)
        if self._started < _THREADS:
            threading.Thread(target=self._serve, name=f"encoding-{self._started}", daemon=True).start()
            self._started += 1
        result: _T = await job.result
        return result

    def close(self) -> None:
        """Ends the threads, each after what it is doing."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _serve(self) -> None:
        untrimmed = False
        while True:
            try:
                job = self._jobs.get(timeout=_QUIET if untrimmed else None)
            except queue.Empty:
                heap.trim()
                untrimmed = False
                continue
            if job is None:
                return
            job.run()
            del job  # or it, its text and its tokens stay until the next one comes
            untrimmed = True
