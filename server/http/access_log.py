"""The access log: one line per request, with the error of a refused one."""

import json
import logging

from starlette.types import Scope

from server.http.log_context import log_ids
from server.http.redaction import Redaction
from server.http.route_facts import facts_of

_METHOD_CHARACTERS, _PATH_CHARACTERS = 20, 200
_log = logging.getLogger("server.access")


def log_access(scope: Scope, status: int, milliseconds: float, redaction: Redaction) -> None:
    """Logs one answered request; a successful poll of a ``quiet`` route at level debug.

    Args:
        scope: its ``state`` holds the ids and, from ``note_refusal``, the error.
        redaction: removes keys from what the client sent.
    """
    level = logging.DEBUG if facts_of(scope).quiet and status < 400 else logging.INFO
    if not _log.isEnabledFor(level):
        return
    reason = scope["state"].get("refusal")
    fields = {
        **log_ids(scope),
        "method": redaction(scope["method"])[:_METHOD_CHARACTERS],
        "path": redaction.address(scope["path"])[:_PATH_CHARACTERS],
        "status": status,
        "duration_ms": round(milliseconds, 1),
        **({} if reason is None else {"reason": reason}),
    }
    suffix = "" if reason is None else f" ({reason})"
    _log.log(
        level,
        "%s %s %s %d %.1f ms%s",
        fields["request_id"], fields["method"], json.dumps(fields["path"]), status, milliseconds, suffix,
        extra={"fields": fields},
    )  # fmt: skip
