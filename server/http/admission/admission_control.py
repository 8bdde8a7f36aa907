"""Whether a request may take a place, decided from its head alone.

One decision for every way a request comes in: the listening socket, the connection, the ASGI stack.
"""

from typing import Protocol

from starlette.types import Scope

from server.errors import ServiceError
from server.http.admission.promised_places import Promise, PromisedPlaces
from server.http.auth import Auth
from server.settings.server import Settings

_GENERATING = frozenset({"/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"})
_PLACED = _GENERATING | {"/compare", "/tokenize"}


class PlacesLike(Protocol):
    """What admission reads and calls of ``server.service.admission.Places``."""

    promised: PromisedPlaces

    def refusal(self, places: int) -> ServiceError | None: ...

    def observe_unread(self, error: ServiceError) -> None: ...


class AdmissionControl:
    """Answers 429 or 503, before anything is read, to requests that need a place while none is free.

    Args:
        auth: refuses with 401 what has no valid key, before anything else.
        settings: how large a body may be.
    """

    def __init__(self, auth: Auth, settings: Settings) -> None:
        self.places: PlacesLike | None = None
        """Set by the lifespan; while None, no request is refused for want of a place."""
        self._auth, self._body_limit = auth, settings.payload_limit

    def refusal(self, scope: Scope) -> ServiceError | None:
        """Why no place is given to this request, which has passed every earlier check; counts it."""
        if not takes_a_place(scope) or (error := self._closed()) is None:
            return None
        return self._counted(error, scope)

    def judge(self, scope: Scope, body_bytes: int, is_whole: bool) -> ServiceError | Promise | None:
        """Of a request for a place that has passed no check yet: the error that refuses it, or its place.

        None where the stack behind has to decide: the body is too large or has yet to come (and must not
        keep a place meanwhile), or the key is not right.

        Args:
            scope: its head.
            body_bytes: how long its body is.
            is_whole: all of the body has come.
        """
        if body_bytes > self._body_limit:
            return None
        unauthorized, error = self._auth.refusal(scope), self._closed()
        if error is not None:
            return unauthorized or self._counted(error, scope)
        if unauthorized is not None or not is_whole or self.places is None:
            return None
        return self.places.promised.promise()

    def _counted(self, error: ServiceError, scope: Scope) -> ServiceError:
        if self.places is not None and _is_among(_GENERATING, scope):
            self.places.observe_unread(error)
        return error

    def _closed(self) -> ServiceError | None:
        return None if self.places is None else self.places.refusal(1)


def takes_a_place(scope: Scope) -> bool:
    """Whether the route of this request reserves places."""
    return scope["method"] == "POST" and _is_among(_PLACED, scope)


def _is_among(paths: frozenset[str], scope: Scope) -> bool:
    path: str = scope["path"]
    return path in paths or path.startswith("/models/")
