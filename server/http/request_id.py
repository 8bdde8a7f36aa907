"""The id by which a request is known in logs, traces and error bodies."""

import random
import re

from starlette.types import Scope

from server.http.redaction import Redaction

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


def request_id_of(scope: Scope, redaction: Redaction) -> str:
    """The client's own, else a new one."""
    return own_request_id(scope, redaction) or new_request_id()


def own_request_id(scope: Scope, redaction: Redaction) -> str | None:
    """The client's ``X-Request-ID`` if it is short and plain and no key."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value) and not redaction.is_in(value):
            return str(value.decode("ascii"))
    return None


def new_request_id() -> str:
    """No secret: it needn't come from the system, which takes a while under load."""
    return f"{random.getrandbits(128):032x}"
