"""Places promised to requests that have been received and have not reserved one yet.

A request reserves its place some iterations of the event loop after its bytes arrive. Without a promise, all
requests of one iteration would find the same place free, and most would be refused later, at a higher cost.
"""

from contextvars import ContextVar


class PromisedPlaces:
    """Counts the promised places of one service. Event loop only."""

    def __init__(self) -> None:
        self.count = 0

    def promise(self) -> "Promise":
        """Promises one place, until the promise is released."""
        self.count += 1
        return Promise(self)


class Promise:
    """One promised place."""

    def __init__(self, places: PromisedPlaces) -> None:
        self._places: PromisedPlaces | None = places

    def release(self) -> None:
        """Gives the place back; idempotent."""
        if self._places is not None:
            self._places.count -= 1
            self._places = None


_current: ContextVar[Promise | None] = ContextVar("promise", default=None)


def hold(promise: Promise) -> None:
    """Attaches the promise to the current context, which is one request's."""
    _current.set(promise)


def release_held() -> None:
    """Releases the current request's promise, if any: when it reserves its places, or ends."""
    if (promise := _current.get()) is not None:
        promise.release()
