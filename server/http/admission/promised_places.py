"""Places kept for requests that have come but not yet reserved their own.

Between a request's bytes and its reservation lie some turns of the event loop. Without a promise, all that
come in one of them would find the same place free, and most would be refused at the end of that way.
"""

from contextvars import ContextVar


class PromisedPlaces:
    """Those of one service. Event loop only."""

    def __init__(self) -> None:
        self.count = 0

    def promise(self) -> "Promise":
        """Keeps one place until it is released."""
        self.count += 1
        return Promise(self)


class Promise:
    """One kept place."""

    def __init__(self, places: PromisedPlaces) -> None:
        self._places: PromisedPlaces | None = places

    def release(self) -> None:
        """Gives it back; any number of times."""
        if self._places is not None:
            self._places.count -= 1
            self._places = None


_current: ContextVar[Promise | None] = ContextVar("promise", default=None)


def hold(promise: Promise) -> None:
    """Makes it that of the request which the current context belongs to."""
    _current.set(promise)


def release_held() -> None:
    """Releases the promise of the current request, if it has one: it reserves its places now, or ends."""
    if (promise := _current.get()) is not None:
        promise.release()
