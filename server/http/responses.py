"""Error responses in both dialects: status, headers and body of a ``ServiceError``."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from server.errors import ServiceError
from server.http.retry_after import retry_after
from server.http.route_facts import Dialect, facts_of

_log = logging.getLogger("server")


_OPENAI_NAMES = {"inputs": "prompt", "max_new_tokens": "max_tokens", "truncate": "truncate_prompt_tokens"}
_FIELD_NAMES = {Dialect.OPENAI: _OPENAI_NAMES, Dialect.OPENAI_CHAT: {**_OPENAI_NAMES, "inputs": "messages"}}


def error_body(error: ServiceError, dialect: Dialect, request_id: str) -> dict[str, Any]:
    """The body of ``error`` in a dialect, with that dialect's names of request fields."""
    if dialect is Dialect.NATIVE:
        return {"error": error.message, "error_type": error.error_type, "request_id": request_id}
    param = _FIELD_NAMES[dialect].get(error.param or "", error.param)
    message = error.message
    if message.startswith(prefix := f"{error.param}: "):
        message = f"{param}: {message.removeprefix(prefix)}"
    kind, code = error.openai_type, error.openai_code
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    error: ServiceError, scope: Scope, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    dialect = facts_of(scope).dialect
    note_refusal(error, scope)
    out = {**(headers or {}), **error_headers(error)}
    return JSONResponse(error_body(error, dialect, request_id(scope)), error_status(error, dialect), out)


def error_status(error: ServiceError, dialect: Dialect) -> int:
    """The status of ``error`` in a dialect."""
    return (None if dialect is Dialect.NATIVE else error.openai_status) or error.status


def error_headers(error: ServiceError) -> dict[str, str]:
    """The headers that an error adds to its response."""
    out = {}
    if error.status == 401:
        out["WWW-Authenticate"] = "Bearer"
    if (seconds := retry_after(error)) is not None:
        out["Retry-After"] = str(seconds)
    if error.should_retry is not None:
        out["x-should-retry"] = str(error.should_retry).lower()
    return out


def note_refusal(error: ServiceError, scope: Scope) -> None:
    """Keeps the error's message for the access log, as one line; messages contain no prompt text."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in error.message)
    scope.setdefault("state", {})["refusal"] = f"{error.error_type}: {message}"


def request_id(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", ""))
