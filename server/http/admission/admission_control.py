"""Whether a request may take a place, decided from its head alone.

One decision for every way a request comes in: the listening socket, the connection, the ASGI stack.
"""

from starlette.datastructures import State
from starlette.types import Scope

from server.errors import ServiceError
from server.http.admission.promised_places import Promise, PromisedPlaces
from server.http.auth import Auth
from server.http.route_facts import RouteTable
from server.settings.server import Settings


class AdmissionControl:
    """Answers 429 or 503, before anything is read, to requests that need a place while none is free.

    Args:
        state: the app's; its ``service`` is looked at when a request comes.
        auth: refuses with 401 what has no valid key, before anything else.
        settings: how large a body may be.
        routes: which requests need a place.
    """

    def __init__(self, state: State, auth: Auth, settings: Settings, routes: RouteTable) -> None:
        self._state, self._auth, self._body_limit = state, auth, settings.payload_limit
        self.routes = routes

    def refusal(self, scope: Scope) -> ServiceError | None:
        """Why no place is given to this request, which has passed every earlier check; counts it."""
        if not self.routes.takes_a_place(scope) or (error := self._closed()) is None:
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
        if unauthorized is not None or not is_whole or not hasattr(self._state, "service"):
            return None
        promised: PromisedPlaces = self._state.service.promised
        return promised.promise()

    def _counted(self, error: ServiceError, scope: Scope) -> ServiceError:
        if self.routes.of(scope).generates:
            self._state.service.observe_unread(error)
        return error

    def _closed(self) -> ServiceError | None:
        service = getattr(self._state, "service", None)  # none before the lifespan has begun
        if service is None:
            return None
        error: ServiceError | None = service.refusal(1)
        return error
