"""How long one answer has waited for its reader, in all its pauses together."""


class ReaderClock:
    """Of one connection.

    Args:
        limit: seconds that an answer may wait.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._answer: object = None
        self._waited = 0.0
        self._since: float | None = None

    def start(self, answer: object, now: float) -> None:
        """Its reader is waited for, from now on; another answer than the last one has all its time."""
        if answer is not self._answer:
            self._answer, self._waited, self._since = answer, 0.0, None
        if self._since is None:
            self._since = now

    def stop(self, now: float) -> None:
        """The reader has taken enough for now."""
        if self._since is not None:
            self._waited += now - self._since
            self._since = None

    @property
    def left(self) -> float:
        """Seconds, as of the last start or stop; none are left from 0 on."""
        return self._limit - self._waited
