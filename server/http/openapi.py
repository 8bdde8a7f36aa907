"""Completes ``/openapi.json``: errors in both dialects, streams, keys, limits that are settings."""

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
    """Makes ``app.openapi`` return the framework's document, corrected and completed."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            limited = _with_limits(document, settings)
            app.openapi_schema = _completed(limited, routes, secured=_needs_key(settings))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _needs_key(settings: Settings) -> bool:
    return bool(settings.api_key or settings.admin_api_key)


def _with_limits(node: Any, settings: Settings) -> Any:
    """``node`` with the limits from the settings in every schema of a body."""
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
    """A field's schema with ``limit`` added to its alternatives of type ``kind``."""
    alternatives = [_limited(one, kind, limit) for one in node.get("anyOf", ())]
    more = {"anyOf": alternatives} if alternatives else {}
    return {**node, **more, **(limit if node.get("type") == kind else {})}


def _completed(document: dict[str, Any], routes: RouteTable, secured: bool) -> dict[str, Any]:
    # the routes under a model's name are listed after the plain ones
    paths = dict(sorted(document["paths"].items(), key=lambda item: item[0].startswith("/models/")))
    for path, operations in paths.items():
        for method, operation in operations.items():
            facts = routes.of({"method": method.upper(), "path": path})  # a template matches its own route
            _complete(operation, facts)
            if facts.public and secured:
                operation["security"] = []
    components: dict[str, Any] = {"schemas": {"Error": _NATIVE_ERROR, "OpenAIError": _OPENAI_ERROR}}
    tags = [{"name": name, "description": text} for name, text in TAGS.items()]
    completed = {**document, "paths": paths, "components": components, "tags": tags}
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        completed["security"] = [{"key": []}]
    return completed


def _complete(operation: dict[str, Any], facts: RouteFacts) -> None:
    description: str = operation.get("description", "")
    operation["summary"] = description.split("\n")[0].split(". ")[0].replace("``", "").rstrip(".")
    schema = "Error" if facts.dialect is Dialect.NATIVE else "OpenAIError"
    error = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    error["example"] = error_body(ServiceError("…"), facts.dialect, "17cc6206d8344e6f855346a4f1273a5b")
    operation["responses"].pop("422", None)  # FastAPI's own validation error, which is never sent
    operation["responses"]["default"] = {"description": "An error", "content": {_JSON: error}}
    answer = operation["responses"]["200"]
    described = answer["content"][_JSON]
    if facts.example is not None:
        described["example"] = facts.example
    answer["content"] = {kind: described if kind == _JSON else {} for kind in facts.media_types}
