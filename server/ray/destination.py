"""Which deployment a request goes to, by the precision that it names."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.routing import Match
from starlette.types import Scope

from server.app import ROUTES
from server.errors import ServiceError
from server.http.body import parse_object
from server.http.route_facts import Dialect
from server.routes.generation_request import merge_parameters
from server.routes.precision_choice import named_precision
from server.settings.types import AUTO

_CHARACTERS = 4096
"""Of a prompt, for request routers that look at it: what differs only later shares its blocks."""
_LEVELS = 8  # of lists and objects in each other; a conversation has four


@dataclass(frozen=True)
class Destination:
    """What a request asks for.

    Args:
        precision: ``AUTO``, a name, or None for the default. None also where the request is not valid: the
            default deployment's app answers it with the same error as a server without a router.
        bounds: of ``AUTO``.
        prompt: the beginning of the request's text.
    """

    precision: str | None = None
    bounds: Mapping[str, Any] | None = None
    prompt: str = ""


def destination(scope: Scope, raw: bytes, dialect: Dialect, served: Collection[str]) -> Destination:
    """Reads a generating request, of which every place may name the precision.

    Args:
        scope: with the path as the app's routes have it.
        raw: its body.
        served: the models' names.
    """
    try:
        values = parse_object(raw)
        if dialect is Dialect.NATIVE:
            values = merge_parameters(values)
        model = None if dialect is Dialect.NATIVE else values.get("model")
        request = Request({**scope, "path_params": _path_parameters(scope)})
        precision = named_precision(request, values, model, served)
    except ServiceError:
        return Destination()
    bounds = values.get("auto")
    if precision is None and bounds is not None:
        precision = AUTO
    return Destination(precision, bounds if isinstance(bounds, dict) else None, _text(values)[:_CHARACTERS])


def _path_parameters(scope: Scope) -> dict[str, Any]:
    if scope["path"].startswith("/models/"):
        for route in ROUTES:
            match, found = route.matches(scope)
            if match is Match.FULL:
                return dict(found.get("path_params", {}))
    return {}


def _text(values: Mapping[str, Any]) -> str:
    """The prompt as text, or as much of it as is text."""
    for name in ("inputs", "prompt", "messages"):
        if name in values:
            return _joined(values[name])
    return ""


def _joined(value: Any, levels: int = _LEVELS) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict) and not levels:
        return ""
    if isinstance(value, list):
        return "".join(_joined(item, levels - 1) for item in value[:_CHARACTERS])
    if isinstance(value, dict):
        return _joined(value.get("content", value.get("text")), levels - 1)
    return f"{value} " if isinstance(value, int) else ""
