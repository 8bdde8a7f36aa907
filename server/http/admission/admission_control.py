"""Admission: whether a request gets a place in the queue, decided from its head.

The listening socket, the connection and the ASGI middleware all call the same ``AdmissionControl``.
"""

from starlette.datastructures import State
from starlette.types import Scope

from server.errors import ServiceError
from server.http.admission.promised_places import Promise, PromisedPlaces
from server.http.auth import Auth
from server.http.route_facts import RouteTable
from server.settings.server import Settings


class AdmissionControl:
    """Refuses requests that need a place with 429 or 503 when the queue is full or the server is draining.

    Args:
        state: the app's; its ``service`` is read at every request.
        auth: a request without a valid key gets 401 rather than 429 or 503.
        settings: the largest accepted body.
        routes: which routes need a place.
    """

    def __init__(self, state: State, auth: Auth, settings: Settings, routes: RouteTable) -> None:
        self._state, self._auth, self._body_limit = state, auth, settings.payload_limit
        self.routes = routes

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
        if unauthorized is not None or not is_whole or not hasattr(self._state, "service"):
            return None
        promised: PromisedPlaces = self._state.service.promised
        return promised.promise()

    def _counted(self, error: ServiceError, scope: Scope) -> ServiceError:
        if self.routes.of(scope).generates:
            self._state.service.observe_unread(error)
        return error

    def _service_refusal(self) -> ServiceError | None:
        service = getattr(self._state, "service", None)  # none before the lifespan has begun
        if service is None:
            return None
        error: ServiceError | None = service.refusal(1)
        return error
