"""Places kept for requests that have come but not yet reserved their own.

Between a request's bytes and its reservation lie some turns of the event loop. Without a promise, all that
come in one of them would find the same place free, and most would be refused at the end of that way.
"""

import asyncio
from contextvars import ContextVar

_ARRIVAL_SECONDS = 1.0
Peer = tuple[str, int]


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


class Arriving:
    """Promises on their way from the listening socket to a connection's protocol, by the client's address.

    What is not taken over soon, since the connection is gone, is released.
    """

    def __init__(self) -> None:
        self._promises: dict[Peer, Promise] = {}

    def put(self, peer: Peer, promise: Promise) -> None:
        self._promises[peer] = promise
        asyncio.get_running_loop().call_later(_ARRIVAL_SECONDS, self._give_up, peer, promise)

    def take(self, peer: Peer | None) -> Promise | None:
        """The promise to the client at this address, once."""
        return self._promises.pop(peer, None) if peer is not None else None

    def _give_up(self, peer: Peer, promise: Promise) -> None:
        if self._promises.get(peer) is promise:
            del self._promises[peer]
            promise.release()


_current: ContextVar[Promise | None] = ContextVar("promise", default=None)


def hold(promise: Promise) -> None:
    """Makes it that of the request which the current context belongs to."""
    _current.set(promise)


def release_held() -> None:
    """Releases the promise of the current request, if it has one: it reserves its places now, or ends."""
    if (promise := _current.get()) is not None:
        promise.release()
