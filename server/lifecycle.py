"""Where the process is in its life: serving, draining, or failed. One instance, event loop only."""

from collections.abc import Callable

from server.errors import NotReady

EXIT_FAILED, EXIT_SOFTWARE = 1, 70
"""Exit codes: it could not start; it went wrong while it served."""


class Lifecycle:
    """Read by the routes (draining refuses new work), written by signal handlers and watchdogs."""

    def __init__(self) -> None:
        self.draining = False
        self.fatal: str | None = None
        self.exit_code = 0
        self._callbacks: list[Callable[[], None]] = []

    def drain(self) -> None:
        """New requests are refused from now on; running ones may finish."""
        self.draining = True
        self._notify()

    def fail(self, reason: str, exit_code: int = EXIT_SOFTWARE) -> None:
        """The process can't go on: requests are refused, and it is to exit with an error."""
        if self.fatal is None:
            self.fatal, self.exit_code = reason, exit_code
            self._notify()

    def check(self) -> None:
        """Whether new work may begin.

        Raises:
            NotReady
        """
        if (error := self.refusal()) is not None:
            raise error

    def refusal(self) -> NotReady | None:
        """Why new work may not begin."""
        if self.fatal is not None:
            return NotReady(f"the server has failed: {self.fatal}")
        return NotReady("the server is shutting down") if self.draining else None

    def subscribe(self, callback: Callable[[], None]) -> None:
        """``callback`` is called after every change."""
        self._callbacks.append(callback)

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()
