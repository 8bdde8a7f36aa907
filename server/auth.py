"""Who may come in. Every route needs the key unless it is named here."""

import hashlib
import hmac
from urllib.parse import parse_qsl

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ServiceError, Unauthorized
from server.replies import error_response
from server.settings import Settings

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/favicon.ico"})
_QUERY_KEYS = frozenset({"api_key", "apikey", "api-key", "key", "token", "access_token", "authorization"})


class Auth:
    """Bearer keys, compared as digests. Without any key configured, everything is open."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._client, self._admin = _digest_of(settings.api_key), _digest_of(settings.admin_api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self.refusal(scope)) is not None:
            await error_response(error, scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ServiceError | None:
        """Why this request may not pass, None if it may."""
        if scope["path"] in OPEN_PATHS or (self._client is None and self._admin is None):
            return None
        if self._key_in_query(scope["query_string"]):
            return Unauthorized("send the key in the Authorization header, not in the address")
        token = _bearer(scope)
        if is_admin(scope):
            return None if _same(token, self._admin) else Unauthorized("this needs the administrator's key")
        if self._client is None or _same(token, self._client) or _same(token, self._admin):
            return None
        return Unauthorized("a valid key is needed: Authorization: Bearer <key>")

    def _key_in_query(self, query: bytes) -> bool:
        """Under a name that says so, or under whatever name."""
        for name, value in parse_qsl(query.decode("latin-1"), errors="surrogateescape"):
            token = value.encode("utf-8", "surrogateescape")
            if name.lower() in _QUERY_KEYS or _same(token, self._client) or _same(token, self._admin):
                return True
        return False


def is_admin(scope: Scope) -> bool:
    """What changes the server for everybody: loading, unloading, the long measurement."""
    path: str = scope["path"]
    return scope["method"] not in ("GET", "HEAD") and path.startswith(("/precisions/", "/report"))


def _bearer(scope: Scope) -> bytes:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or values[0][:7].lower() != b"bearer ":
        return b""
    return bytes(values[0][7:].strip())


def _digest_of(key: SecretStr | None) -> bytes | None:
    text = key.get_secret_value() if key else ""
    return hashlib.sha256(text.encode()).digest() if text else None


def _same(token: bytes, digest: bytes | None) -> bool:
    return digest is not None and hmac.compare_digest(hashlib.sha256(token).digest(), digest)
