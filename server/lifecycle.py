"""Whether the process serves, drains or has failed."""

from collections.abc import Callable

from server.errors import NotReady

EXIT_FAILED, EXIT_SOFTWARE = 1, 70
"""Exit codes: the start failed; serving failed."""


class Lifecycle:
    """One instance per app, event loop only. Written by signal handlers and the watchdog, read by routes."""

    def __init__(self) -> None:
        self.draining = False
        self.fatal: str | None = None
        self.exit_code = 0
        self._callbacks: list[Callable[[], None]] = []

    def drain(self) -> None:
        """From now on new requests are refused; running ones may finish."""
        self.draining = True
        self._notify()

    def fail(self, reason: str, exit_code: int = EXIT_SOFTWARE) -> None:
        """Requests are refused from now on; the process exits with ``exit_code``. The first call counts."""
        if self.fatal is None:
            self.fatal, self.exit_code = reason, exit_code
            self._notify()

    def check(self) -> None:
        """Raises: NotReady: draining or failed."""
        if (error := self.refusal()) is not None:
            raise error

    def refusal(self) -> NotReady | None:
        """The error for new requests; None while serving."""
        if self.fatal is not None:
            return NotReady(f"the server has failed: {self.fatal}")
        return NotReady("the server is shutting down") if self.draining else None

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Registers ``callback``, which is called after every change."""
        self._callbacks.append(callback)

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()
