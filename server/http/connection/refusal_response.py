"""The bytes of a refusal's response. What refusals of the same kind have in common is encoded once.

Under overload thousands of responses a second differ only in id, date and ``Retry-After``.
"""

import time
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from pydantic_core import to_json

from server.errors import ServiceError
from server.http.request_id import new_request_id
from server.http.responses import error_body, error_headers, error_status
from server.http.retry_after import retry_after
from server.http.route_facts import Dialect

_MARK = new_request_id()  # takes the place of the id
_MOST = 64  # templates
_RETRY_AFTER = "Retry-After"


@dataclass(frozen=True, slots=True)
class _Template:
    """A response without its date, ``Retry-After`` and id."""

    status: int
    head: bytes
    before_id: bytes
    after_id: bytes | None
    """None: the body has no id, ``before_id`` is all of it."""


class RefusalResponses:
    """Encodes refusals and caches their templates."""

    def __init__(self) -> None:
        self._templates: dict[tuple[object, ...], _Template] = {}

    def encoded(self, error: ServiceError, dialect: Dialect, id_: str, close: bool) -> tuple[int, bytes]:
        """Status and bytes of the response to a request that does not reach the framework.

        Args:
            id_: of ASCII characters that need no escape in JSON.
            close: adds ``Connection: close``.
        """
        key = type(error), error.message, error.param, dialect
        template = self._templates.get(key) or self._keep(key, _template(error, dialect))
        body, id_bytes, seconds = template.before_id, id_.encode("ascii"), retry_after(error)
        if template.after_id is not None:
            body += id_bytes + template.after_id
        return template.status, b"%bdate: %b\r\n%bcontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b" % (
            template.head,
            _date(int(time.time())),
            b"" if seconds is None else b"retry-after: %d\r\n" % seconds,
            len(body),
            id_bytes,
            b"connection: close\r\n" if close else b"",
            body,
        )

    def _keep(self, key: tuple[object, ...], template: _Template) -> _Template:
        if len(self._templates) >= _MOST:
            self._templates.clear()
        self._templates[key] = template
        return template


def _template(error: ServiceError, dialect: Dialect) -> _Template:
    status, body = error_status(error, dialect), to_json(error_body(error, dialect, _MARK))
    fixed = {name.lower(): value for name, value in error_headers(error).items() if name != _RETRY_AFTER}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in fixed.items()]
    head = "".join(f"{line}\r\n" for line in lines).encode()
    before, mark, after = body.partition(_MARK.encode())
    return _Template(status, head, before, after if mark else None)


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()
