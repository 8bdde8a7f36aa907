"""The ids in the log lines of a request, which join them with one another and with the request's trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from starlette.types import Scope

_KEY = "log_ids"
_NONE: Mapping[str, str] = MappingProxyType({})
_current: ContextVar[Mapping[str, str]] = ContextVar(_KEY, default=_NONE)


def log_ids(scope: Scope) -> dict[str, str]:
    """A request's ids by their names in the log: ``request_id``; a tracer adds its own."""
    state = scope.setdefault("state", {})
    ids: dict[str, str] = state.setdefault(_KEY, {"request_id": str(state.get("request_id", ""))})
    return ids


def current_ids() -> Mapping[str, str]:
    """The ids of the request that the caller works for; none outside of requests."""
    return _current.get()


@contextmanager
def logged_as(scope: Scope) -> Iterator[None]:
    """What is logged inside, and in tasks and threads that are started there, has the request's ids."""
    token = _current.set(log_ids(scope))
    try:
        yield
    finally:
        _current.reset(token)
