"""Where the process is in its life: serving, draining, or failed. One instance, event loop only."""

from collections.abc import Callable


class Lifecycle:
    """Read by the routes (draining refuses new work), written by signal handlers and watchdogs."""

    def __init__(self) -> None:
        self.draining = False
        self.fatal: str | None = None
        self._callbacks: list[Callable[[], None]] = []

    def drain(self) -> None:
        """New requests are refused from now on; running ones may finish."""
        self.draining = True
        self._notify()

    def fail(self, reason: str) -> None:
        """The process can't go on: requests are refused, and it is to exit with an error."""
        if self.fatal is None:
            self.fatal = reason
            self._notify()

    def subscribe(self, callback: Callable[[], None]) -> None:
        """``callback`` is called after every change."""
        self._callbacks.append(callback)

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()
