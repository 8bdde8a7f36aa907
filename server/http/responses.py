"""How answers leave: errors in both dialects, event streams, and work that ends when its client goes."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from server.errors import ServiceError
from server.http.retry_after import retry_after

_log = logging.getLogger("server")


def is_openai(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/") or (path.startswith("/models/") and "/v1/" in path)


_OPENAI_NAMES = {"inputs": "prompt", "max_new_tokens": "max_tokens", "truncate": "truncate_prompt_tokens"}
_CHAT_NAMES = {**_OPENAI_NAMES, "inputs": "messages"}


def error_body(error: ServiceError, path: str, request_id: str) -> dict[str, Any]:
    """The body that tells of ``error`` in the dialect of ``path``, whose names for fields it uses."""
    if is_openai(path):
        names = _CHAT_NAMES if path.endswith("/chat/completions") else _OPENAI_NAMES
        param = names.get(error.param or "", error.param)
        message = error.message
        if message.startswith(prefix := f"{error.param}: "):
            message = f"{param}: {message.removeprefix(prefix)}"
        kind, code = error.openai_type, error.openai_code
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return {"error": error.message, "error_type": error.error_type, "request_id": request_id}


def error_response(
    error: ServiceError, scope: Scope, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    path = scope["path"]
    note_refusal(error, scope)
    out = {**(headers or {}), **error_headers(error)}
    return JSONResponse(error_body(error, path, request_id(scope)), error_status(error, path), out)


def error_status(error: ServiceError, path: str) -> int:
    """The status that ``error`` has in the dialect of ``path``."""
    return (error.openai_status if is_openai(path) else None) or error.status


def error_headers(error: ServiceError) -> dict[str, str]:
    """What an error's answer has beside the headers of every answer."""
    out = {}
    if error.status == 401:
        out["WWW-Authenticate"] = "Bearer"
    if (seconds := retry_after(error)) is not None:
        out["Retry-After"] = str(seconds)
    if error.should_retry is not None:
        out["x-should-retry"] = str(error.should_retry).lower()
    return out


def note_refusal(error: ServiceError, scope: Scope) -> None:
    """For the access log, on one line; messages hold no prompt."""
    message = "".join(c if c.isprintable() else "\ufffd" for c in error.message)
    scope.setdefault("state", {})["refusal"] = f"{error.error_type}: {message}"


def request_id(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", ""))
