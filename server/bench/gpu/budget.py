"""A time budget: parts that no longer fit are skipped, and a hanging part is stopped."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

_GRACE = 12.0  # seconds from TimeUp until the process exits


@contextmanager
def another_process() -> Iterator[Executor]:
    """An executor with one new process, which is killed at the end."""
    executor = ProcessPoolExecutor(1, get_context("spawn"))
    try:
        yield executor
    finally:
        for process in list((executor._processes or {}).values()):
            process.kill()
        executor.shutdown(cancel_futures=True)


class TimeUp(BaseException):
    """The time is over. A ``BaseException``, so that no part handles it as its own error."""


class Budget:
    """A number of seconds from construction."""

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        return self._seconds - self.spent

    @contextmanager
    def enforced(self, at_the_end: Callable[[], object]) -> Iterator[None]:
        """Raises ``TimeUp`` in the main thread shortly before the time is over, so that everything is closed.

        If the main thread doesn't react, as in a call that never returns, the process exits with status 2.

        Args:
            at_the_end: called before that exit.
        """

        def stop(*_: object) -> None:
            raise TimeUp

        def end() -> None:
            at_the_end()
            os._exit(2)

        before = signal.signal(signal.SIGALRM, stop)
        last = threading.Timer(max(self.left, 1.0), end)
        last.daemon = True
        signal.setitimer(signal.ITIMER_REAL, max(self.left - _GRACE, 0.5))
        last.start()
        try:
            yield
        finally:
            last.cancel()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
