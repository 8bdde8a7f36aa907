"""``/openapi.json`` made true: errors in both dialects, streams, keys; told in the order a reader wants."""

from typing import Any

from fastapi import FastAPI

from server.errors import ServiceError
from server.http.responses import error_body
from server.http.route_facts import Dialect, RouteFacts, RouteTable
from server.settings.server import Settings

TAGS = {
    "generate": "Text Generation Inference's dialect.",
    "openai": "OpenAI's dialect.",
    "comparing": "One prompt in several precisions; all of them measured, and which one to run.",
    "looking": "What is loaded, what it takes, how fast it is.",
    "precisions": "What this host can run; loading and unloading.",
    "health": "For supervisors and load balancers. Never needs a key.",
}
_JSON = "application/json"
_TEXT = {"type": "string"}
_OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_NATIVE_ERROR = {
    "type": "object",
    "properties": {"error": _TEXT, "error_type": _TEXT, "request_id": _TEXT},
    "required": ["error", "error_type", "request_id"],
}
_OPENAI_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": _TEXT, "type": _TEXT, "param": _OPTIONAL, "code": _OPTIONAL},
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def describe(app: FastAPI, settings: Settings, routes: RouteTable) -> None:
    """Replaces what the framework says of itself by what this service does."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            limited = _with_limits(document, settings)
            app.openapi_schema = _mended(limited, routes, secured=_needs_key(settings))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _needs_key(settings: Settings) -> bool:
    return bool(settings.api_key or settings.admin_api_key)


def _with_limits(node: Any, settings: Settings) -> Any:
    """``node`` with the limits that are settings, wherever it describes a body's fields."""
    if isinstance(node, list):
        return [_with_limits(item, settings) for item in node]
    if not isinstance(node, dict):
        return node
    described = {key: _with_limits(value, settings) for key, value in node.items()}
    fields = described.get("properties", {})
    for name, kind, limit, value in (
        ("stop", "array", "maxItems", settings.max_stop_sequences),
        ("n", "integer", "maximum", settings.max_best_of),
        ("best_of", "integer", "maximum", settings.max_best_of),
    ):
        if name in fields:
            fields[name] = _limited(fields[name], kind, {limit: value})
    return described


def _limited(node: Any, kind: str, limit: dict[str, int]) -> Any:
    """A field's schema with ``limit`` on those of its alternatives that are of a ``kind``."""
    alternatives = [_limited(one, kind, limit) for one in node.get("anyOf", ())]
    more = {"anyOf": alternatives} if alternatives else {}
    return {**node, **more, **(limit if node.get("type") == kind else {})}


def _mended(document: dict[str, Any], routes: RouteTable, secured: bool) -> dict[str, Any]:
    # the same routes under a model's name come after the plain ones
    paths = dict(sorted(document["paths"].items(), key=lambda item: item[0].startswith("/models/")))
    for path, operations in paths.items():
        for method, operation in operations.items():
            facts = routes.of({"method": method.upper(), "path": path})  # a template matches its own route
            _mend(operation, facts)
            if facts.public and secured:
                operation["security"] = []
    components: dict[str, Any] = {"schemas": {"Error": _NATIVE_ERROR, "OpenAIError": _OPENAI_ERROR}}
    about = [{"name": name, "description": text} for name, text in TAGS.items()]
    mended = {**document, "paths": paths, "components": components, "tags": about}
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        mended["security"] = [{"key": []}]
    return mended


def _mend(operation: dict[str, Any], facts: RouteFacts) -> None:
    told: str = operation.get("description", "")
    operation["summary"] = told.split("\n")[0].split(". ")[0].replace("``", "").rstrip(".")
    schema = "Error" if facts.dialect is Dialect.NATIVE else "OpenAIError"
    error = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    error["example"] = error_body(ServiceError("…"), facts.dialect, "17cc6206d8344e6f855346a4f1273a5b")
    operation["responses"].pop("422", None)  # the framework's own, which is never sent
    operation["responses"]["default"] = {"description": "An error", "content": {_JSON: error}}
    answer = operation["responses"]["200"]
    described = answer["content"][_JSON]
    if facts.example is not None:
        described["example"] = facts.example
    answer["content"] = {kind: described if kind == _JSON else {} for kind in facts.media_types}
