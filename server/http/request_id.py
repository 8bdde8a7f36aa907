"""The request id in logs, traces, error bodies and ``X-Request-ID``."""

import random
import re

from starlette.types import Scope

from server.http.redaction import Redaction

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


def request_id_of(scope: Scope, redaction: Redaction) -> str:
    """The client's id if it is acceptable, otherwise a new one."""
    return own_request_id(scope, redaction) or new_request_id()


def own_request_id(scope: Scope, redaction: Redaction) -> str | None:
    """The client's ``X-Request-ID``; None if it is missing, long, not plain ASCII or contains a key."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value) and not redaction.is_in(value):
            return str(value.decode("ascii"))
    return None


def new_request_id() -> str:
    """A random id. Not a secret, so not from the system's random source, which is slow under load."""
    return random.getrandbits(128).to_bytes(16).hex()
