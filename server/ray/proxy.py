"""A middleware for Ray's HTTP proxies, which have a request id of their own and answer with both.

Named by an environment variable where the cluster is started:
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=server.ray.proxy.middlewares``.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.redaction import Redaction
from server.http.request_id import own_request_id

_ID = b"x-request-id"


def middlewares() -> list[Middleware]:
    """What Ray's proxies put in front of themselves."""
    return [Middleware(OneRequestId)]


class OneRequestId:
    """Passes on a client's request id only if the service takes it, and returns the service's alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._nothing = app, Redaction(())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if own_request_id(scope, self._nothing) is None:
            scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != _ID]}

        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_first_id(message["headers"])}
            await send(message)

        await self._app(scope, receive, send_one)


def _with_first_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    ids = [header for header in headers if header[0].lower() == _ID]
    return [*(header for header in headers if header[0].lower() != _ID), *ids[:1]]
