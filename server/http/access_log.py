"""The access log: a line a request, with the reason of a refusal."""

import json
import logging

from starlette.types import Scope

from server.http.redaction import Redaction
from server.http.route_facts import facts_of

_METHOD_CHARACTERS, _PATH_CHARACTERS = 20, 200
_log = logging.getLogger("server.access")


def log_access(scope: Scope, status: int, milliseconds: float, redaction: Redaction) -> None:
    """One request that has been answered; what supervisors and scrapers repeat for ever at level debug only.

    Args:
        scope: its ``state`` has the request's id and, from ``note_refusal``, the reason of an error.
        redaction: takes the keys out of what the client sent.
    """
    level = logging.DEBUG if facts_of(scope).quiet and status < 400 else logging.INFO
    if not _log.isEnabledFor(level):
        return
    reason = scope["state"].get("refusal")
    fields = {
        "request_id": scope["state"]["request_id"],
        "method": redaction(scope["method"])[:_METHOD_CHARACTERS],
        "path": redaction.address(scope["path"])[:_PATH_CHARACTERS],
        "status": status,
        "duration_ms": round(milliseconds, 1),
        **({} if reason is None else {"reason": reason}),
    }
    because = "" if reason is None else f" ({reason})"
    _log.log(
        level,
        "%s %s %s %d %.1f ms%s",
        fields["request_id"], fields["method"], json.dumps(fields["path"]), status, milliseconds, because,
        extra={"fields": fields},
    )  # fmt: skip
