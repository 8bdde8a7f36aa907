"""API keys. Every route needs one unless it is declared public (``RouteFacts``)."""

import hashlib
import hmac
import re
from urllib.parse import parse_qsl

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ServiceError, Unauthorized
from server.http.redaction import Redaction
from server.http.responses import error_response
from server.http.route_facts import RouteTable
from server.settings.server import Settings

_KEY_NAME = re.compile(
    r"(?:x[-_]?)?(?:(?:api|auth|access|admin|bearer|hf|secret)[-_]?)*(?:key|token)|auth(?:orization)?|bearer",
    re.IGNORECASE,
)
"""Names of query parameters whose value is meant as a key."""
_Digests = frozenset[bytes]


class Auth:
    """Checks bearer keys by their digests. Without a configured key every route is open."""

    def __init__(self, app: ASGIApp, settings: Settings, routes: RouteTable) -> None:
        self.app, self._routes = app, routes
        self._client, self._admin = _digests_of(settings.api_key), _digests_of(settings.admin_api_key)
        self._keys = Redaction(settings.secrets())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self.refusal(scope)) is not None:
            await error_response(error, scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ServiceError | None:
        """The 401 of this request, None if its key is valid."""
        if not (self._client or self._admin) or (facts := self._routes.of(scope)).public:
            return None
        query = scope["query_string"]
        if _names_a_key(query):
            return Unauthorized(_KEY_IN_QUERY)
        refusal = self._check_key(_bearer(scope), facts.admin)
        if refusal is None and self._keys.is_in(query):
            return Unauthorized(_KEY_IN_QUERY)
        return refusal

    def _check_key(self, token: bytes, admin: bool) -> ServiceError | None:
        if admin:
            return (
                None if _is_one_of(token, self._admin) else Unauthorized("this needs the administrator's key")
            )
        if not self._client or _is_one_of(token, self._client | self._admin):
            return None
        return Unauthorized("a valid key is needed: Authorization: Bearer <key>")


_KEY_IN_QUERY = "send the key in the Authorization header, not in the address"


def _names_a_key(query: bytes) -> bool:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    return any(_KEY_NAME.fullmatch(name.strip()) for name, _ in pairs)


def _bearer(scope: Scope) -> bytes:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or values[0][:7].lower() != b"bearer ":
        return b""
    return bytes(values[0][7:].strip())


def owner_of(scope: Scope) -> str:
    """Who sends a request, by its key and without telling it; clients without a key are one owner.

    Also where the server checks no key: a proxy in front of it may.
    """
    token = _bearer(scope)
    return hashlib.sha256(token).hexdigest() if token else ""


def _digests_of(key: SecretStr | None) -> _Digests:
    """Digests of a key as UTF-8 and as Latin-1: clients encode headers either way."""
    text = key.get_secret_value() if key else ""
    return frozenset(
        hashlib.sha256(text.encode(encoding)).digest() for encoding in ("utf-8", "latin-1") if text
    )


def _is_one_of(token: bytes, digests: _Digests) -> bool:
    sent = hashlib.sha256(token).digest()
    return any(hmac.compare_digest(sent, digest) for digest in digests)
