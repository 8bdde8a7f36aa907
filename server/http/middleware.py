"""ASGI middleware of every request: id, access log, error responses, admission, body limits."""

import asyncio
import logging
import time
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import PayloadTooLarge, RequestTimeout, ServiceError
from server.http.access_log import log_access
from server.http.admission.admission_control import AdmissionControl
from server.http.admission.promised_places import hold
from server.http.log_context import logged_as
from server.http.redaction import Redaction
from server.http.request_id import request_id_of
from server.http.responses import error_response
from server.http.route_facts import RouteTable
from server.http.streaming import ClientGone
from server.settings.server import Settings

_log = logging.getLogger("server")
_PASSED_ON = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit)


class RequestContext:
    """The outermost middleware: sets the request id and the route's facts, writes the access log (without
    query and keys), and turns an unhandled exception into a response."""

    def __init__(self, app: ASGIApp, settings: Settings, routes: RouteTable) -> None:
        self.app, self._routes = app, routes
        self._redaction = Redaction(settings.secrets())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id_ = scope.setdefault("state", {})["request_id"] = request_id_of(scope, self._redaction)
        self._routes.of(scope)  # memoized in the scope, for error responses and the access log
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id_
            await send(message)

        with logged_as(scope):
            try:
                await self.app(scope, receive, send_with_id)
            except (ClientDisconnect, ClientGone):
                status = status or 499
                await _end_exchange(send)
            except _PASSED_ON:
                raise
            except BaseException as error:  # a Rust library's panic is not an Exception
                if status:
                    raise
                _log_fault(error, id_)
                await error_response(_as_service_error(error), scope)(scope, receive, send_with_id)
            finally:
                log_access(scope, status, (time.perf_counter() - started) * 1000, self._redaction)


def _as_service_error(error: BaseException) -> ServiceError:
    return error if isinstance(error, ServiceError) else ServiceError("internal error")


def _log_fault(error: BaseException, id_: str) -> None:
    if not isinstance(error, ServiceError):
        _log.error("request %s: an unforeseen fault", id_, exc_info=error)


async def _end_exchange(send: Send) -> None:
    """Completes the ASGI exchange of a client that has disconnected."""
    await send({"type": "http.response.start", "status": 499, "headers": []})
    await send({"type": "http.response.body", "body": b""})


class AdmissionMiddleware:
    """Answers 429 or 503 before the body is read when a request needs a place in the queue and none is free.

    ``server.http.connection.early_refusal`` does the same below the framework for plain requests.
    """

    def __init__(self, app: ASGIApp, admission: AdmissionControl) -> None:
        self.app, self._admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        promise = scope.get("state", {}).pop("promise", None)
        if promise is not None:
            hold(promise)
        refusal = self._admission.refusal(scope) if scope["type"] == "http" and promise is None else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await error_response(refusal, scope)(scope, receive, send)


class BodyLimits:
    """Limits the size of a body and the time to receive it; a declared length is checked before reading."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._limit, self._seconds = settings.payload_limit, settings.receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif _declared_length(scope) > self._limit:
            await error_response(_too_large(self._limit), scope)(scope, receive, send)
        else:
            body = _Body(receive, send, self._limit, self._seconds)
            await self.app(scope, body.receive, body.send)


class _Body:
    """One request's body under its limits, which end when the response has begun."""

    def __init__(self, receive: Receive, send: Send, limit: int, seconds: float) -> None:
        self._receive, self._send, self._limit = receive, send, limit
        self._deadline = time.perf_counter() + seconds
        self._received, self._unlimited = 0, False

    async def send(self, message: Message) -> None:
        self._unlimited = True
        await self._send(message)

    async def receive(self) -> Message:
        message = await self._receive_in_time()
        self._received += len(message.get("body", b""))
        if self._received > self._limit and not self._unlimited:
            raise _too_large(self._limit)
        self._unlimited = self._unlimited or not message.get("more_body", False)
        return message

    async def _receive_in_time(self) -> Message:
        if not self._unlimited:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._deadline - time.perf_counter()):
                    return await self._receive()
        if not self._unlimited:  # the response may have begun meanwhile
            raise RequestTimeout("the body took too long to arrive")
        return await self._receive()


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body may have {limit} bytes")


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])  # h11 takes no more digits
    return 0
