"""Facts about a route, declared at its endpoint and read before the router has chosen it.

Keys, admission, refusals below the framework and the access log need them earlier than the router runs.
``RouteTable`` finds the route that the router will choose and returns the facts of its endpoint.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Route
from starlette.types import Scope

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_DECLARED, _MEMO = "route_facts", "bitdial.route_facts"


class Dialect(Enum):
    """The shape of error bodies, and the request fields that they name."""

    NATIVE = "native"
    OPENAI = "openai"
    OPENAI_CHAT = "openai-chat"


@dataclass(frozen=True, slots=True)
class RouteFacts:
    """Declares them as a decorator of an endpoint, below its routes: ``@RouteFacts(admin=True)``."""

    takes_a_place: bool = False
    """Reserves places in the queue: refused before its body is read while the queue is full."""
    generates: bool = False
    """Such a refusal is counted among the generations."""
    admin: bool = False
    """Needs the administrator's key."""
    public: bool = False
    """Needs no key."""
    quiet: bool = False
    """Polled for ever: a success is logged at level debug."""
    dialect: Dialect = Dialect.NATIVE
    media_types: tuple[str, ...] = ("application/json",)
    """Content types of a successful response, for the API document."""
    example: Any = None
    """A successful JSON response, for the API document."""

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _DECLARED, self)
        return endpoint


_UNKNOWN = {dialect: RouteFacts(dialect=dialect) for dialect in Dialect}


def declared(route: BaseRoute) -> RouteFacts | None:
    """What the route's endpoint declares; None if it declares nothing."""
    return getattr(getattr(route, "endpoint", None), _DECLARED, None)


class RouteTable:
    """Finds the facts of requests. One per app.

    Args:
        routes: in the order in which the router tries them.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]
        # early refusal reads this for every request: a lookup for paths without parameters
        self._fixed = {
            (method, route.path): self._find(method, route.path)
            for route in self._routes
            for method in route.methods or ()
            if not route.param_convertors
        }

    def of(self, scope: Scope) -> RouteFacts:
        """The facts of the route that the router will choose; remembered in ``scope``."""
        facts: RouteFacts | None = scope.get(_MEMO)
        if facts is None:
            key = scope["method"], scope["path"]
            facts = scope[_MEMO] = self._fixed.get(key) or self._find(*key)
        return facts

    def takes_a_place(self, scope: Scope) -> bool:
        return self.of(scope).takes_a_place

    def _find(self, method: str, path: str) -> RouteFacts:
        """As Starlette's router: the first route that takes the path and the method.

        A method that none of the path's routes takes (405) needs the administrator's key if one of them does,
        unless it is GET, which changes nothing.
        """
        method = "GET" if method == "HEAD" else method
        found = [route for route in self._routes if route.path_regex.match(path)]
        for route in found:
            if method in (route.methods or ()):
                return declared(route) or RouteFacts()
        if not found:
            return _unknown(path)
        strictest = max((declared(route) or RouteFacts() for route in found), key=lambda facts: facts.admin)
        admin = strictest.admin and method != "GET"
        return replace(strictest, admin=admin, takes_a_place=False, generates=False)


def facts_of(scope: Scope) -> RouteFacts:
    """The facts that ``RouteTable.of`` has remembered in ``scope``; those of an unknown path otherwise."""
    facts: RouteFacts | None = scope.get(_MEMO)
    return facts or _unknown(scope["path"])


def _unknown(path: str) -> RouteFacts:
    """A path of no route needs a key; its 404 is in the dialect of its prefix."""
    is_openai = path == "/v1" or path.startswith("/v1/")
    return _UNKNOWN[Dialect.OPENAI if is_openai else Dialect.NATIVE]
