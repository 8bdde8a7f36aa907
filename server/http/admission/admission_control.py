"""Admission: whether a request gets a place in the queue, decided from its head.

The listening socket, the connection and the ASGI middleware all call the same ``AdmissionControl``.
"""

from typing import Protocol

from starlette.types import Scope

from server.errors import ServiceError
from server.http.admission.promised_places import Promise, PromisedPlaces
from server.http.auth import Auth
from server.http.route_facts import Dialect, RouteTable
from server.settings.server import Settings


class PlacesLike(Protocol):
    """What admission reads and calls of ``server.service.admission.Places``."""

    promised: PromisedPlaces

    def refusal(self, places: int) -> ServiceError | None: ...

    def observe_unread(self, error: ServiceError, is_chat: bool) -> None: ...


class AdmissionControl:
    """Refuses requests that need a place with 429 or 503 when the queue is full or the server is draining.

    Args:
        auth: a request without a valid key gets 401 rather than 429 or 503.
        settings: the largest accepted body.
        routes: which routes need a place.
    """

    def __init__(self, auth: Auth, settings: Settings, routes: RouteTable) -> None:
        self.places: PlacesLike | None = None
        """Set by the lifespan; until then no request is refused for want of a place."""
        self._auth, self._body_limit = auth, settings.payload_limit
        self.routes = routes

    @property
    def is_full(self) -> bool:
        """Whether a request that needs a place is refused now."""
        return self._service_refusal() is not None

    def refusal(self, scope: Scope) -> ServiceError | None:
        """The error of a request that passed every earlier check, None if admitted; counts the error."""
        if not self.routes.takes_a_place(scope) or (error := self._service_refusal()) is None:
            return None
        return self._counted(error, scope)

    def judge(self, scope: Scope, body_bytes: int, is_whole: bool) -> ServiceError | Promise | None:
        """Checks a request for a place before the framework does: returns its error, or a promised place.

        None if the middleware has to decide: the body is too large or not received yet (and must not keep
        a place meanwhile), or the key is not valid.

        Args:
            scope: of its head.
            body_bytes: length of its body.
            is_whole: all of the body has been received.
        """
        if body_bytes > self._body_limit:
            return None
        unauthorized, error = self._auth.refusal(scope), self._service_refusal()
        if error is not None:
            return unauthorized or self._counted(error, scope)
        if unauthorized is not None or not is_whole or self.places is None:
            return None
        return self.places.promised.promise()

    def _counted(self, error: ServiceError, scope: Scope) -> ServiceError:
        facts = self.routes.of(scope)
        if self.places is not None and facts.generates:
            self.places.observe_unread(error, facts.dialect is Dialect.OPENAI_CHAT)
        return error

    def _service_refusal(self) -> ServiceError | None:
        return None if self.places is None else self.places.refusal(1)
