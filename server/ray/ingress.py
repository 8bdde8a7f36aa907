"""The router's ASGI app: the checks that come before a body is read, then the deployment that answers.

What it can't decide it passes on, so that the app behind it answers as it does on a single host.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import chain

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import loaders
from loaders.errors import UnknownPrecision
from server.app import ROUTES
from server.errors import NotReady, ServiceError
from server.http.auth import Auth
from server.http.methods import HeadAsGet
from server.http.middleware import BodyLimits, RequestContext
from server.http.responses import error_response
from server.http.route_facts import RouteTable, facts_of
from server.http.streaming import until_disconnect
from server.observability.exposition import PLAIN_TYPE
from server.ray.comparing import Comparisons
from server.ray.destination import destination
from server.ray.exchange import Forwarded, Whole
from server.ray.fleet import Fleet
from server.ray.forwarding import Forwarding
from server.ray.merged_metrics import MergedMetrics
from server.ray.merged_stats import merged_stats
from server.settings.server import Settings
from server.settings.types import ALL, AUTO

_HEALTH_SECONDS, _LOOKING_SECONDS = 2.0, 30.0
_OWN_ID = b"x-request-id"
Answer = Callable[[Request, Forwarded], Awaitable[Response]]


def create_ingress(settings: Settings, fleet: Fleet) -> ASGIApp:
    """The app that clients of the whole fleet see."""
    routes = RouteTable(ROUTES)
    app: ASGIApp = HeadAsGet(Ingress(settings, fleet, routes))
    app = BodyLimits(app, settings)
    app = Auth(app, settings, routes)
    if settings.cors_allow_origin:
        app = CORSMiddleware(
            app,
            allow_origins=list(settings.cors_allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Precision", "X-Request-ID", "Retry-After"],
        )
    return _Mounted(RequestContext(app, settings, routes))


class _Mounted:
    """Removes the application's prefix from paths, and answers the protocol of lifespans."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
        elif scope["type"] == "http":
            prefix = scope.get("root_path", "")
            path = scope["path"].removeprefix(prefix) or "/"
            await self._app({**scope, "path": path, "root_path": ""}, receive, send)


class Ingress:
    """Chooses the deployment of each request, and answers itself what concerns all of them."""

    def __init__(self, settings: Settings, fleet: Fleet, routes: RouteTable) -> None:
        self._fleet, self._routes = fleet, routes
        self._forwarding = Forwarding(fleet, settings.request_timeout)
        self._metrics = MergedMetrics()
        comparisons = Comparisons(fleet, settings.request_timeout)
        self._answers: dict[tuple[str, str], Answer] = {
            ("GET", "/health/live"): self._live,
            ("GET", "/health/ready"): self._ready,
            ("GET", "/health"): self._ready,
            ("GET", "/stats"): self._stats,
            ("GET", "/metrics"): self._prometheus,
            ("GET", "/precisions"): self._precisions,
            ("POST", "/compare"): comparisons.answer,
        }
        self._models: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        # Ray's proxies hand the body over in a call of its own
        raw = b"" if scope["method"] == "GET" else await request.body()
        forwarded = Forwarded(scope["method"], scope["path"], scope["query_string"], _headers(scope), raw)
        answer = self._answers.get((scope["method"], scope["path"])) or self._admin(scope)
        if answer is None:
            name, forwarded = await self._destination(scope, forwarded)
            await self._forwarding.forward(name, forwarded, scope, receive, send)
            return
        try:
            response = await until_disconnect(request, _response(answer(request, forwarded)))
        except ServiceError as error:
            response = error_response(error, scope)
        await response(scope, receive, send)

    async def _destination(self, scope: Scope, forwarded: Forwarded) -> tuple[str, Forwarded]:
        facts = facts_of(scope)
        if not facts.generates:
            return self._fleet.default, forwarded
        found = destination(scope, forwarded.body, facts.dialect, await self._served(forwarded))
        precision = found.precision
        forwarded = Forwarded(
            forwarded.method, forwarded.path, forwarded.query, forwarded.headers, forwarded.body, found.prompt
        )
        if precision == AUTO:
            with suppress(ServiceError):
                precision = await self._fleet.call(self._fleet.default, "choose", forwarded, found.bounds)
        return self._fleet.serving(precision), forwarded

    async def _served(self, forwarded: Forwarded) -> list[str]:
        """The served models' names; none while the default deployment can't tell them."""
        if not self._models:
            with suppress(ServiceError):
                self._models = await self._fleet.call(self._fleet.default, "models", forwarded)
        return self._models

    def _admin(self, scope: Scope) -> Answer | None:
        """The answer of a request to load or unload a precision, which concerns all replicas of one."""
        parts = scope["path"].split("/")
        if scope["method"] != "POST" or len(parts) != 4 or parts[1] != "precisions":
            return None
        if parts[3] not in ("load", "unload") or (names := self._deployments(parts[2], parts[3])) is None:
            return None

        async def answer(request: Request, forwarded: Forwarded) -> Response:
            replies = await asyncio.gather(*(self._all(name, "answer", forwarded) for name in names))
            found = list(chain.from_iterable(replies))
            failed = [one for one in found if one.status != 200 or b'"status":"failed"' in one.body]
            return _whole((failed or found)[0])

        return answer

    def _deployments(self, precision: str, verb: str) -> list[str] | None:
        """Those of a precision in an address; None where it is none."""
        if precision == ALL and verb == "unload":
            return list(self._fleet.names)
        try:
            return [self._fleet.serving(loaders.canonical(precision))]
        except UnknownPrecision:
            return None

    async def _all(self, name: str, method: str, forwarded: Forwarded) -> list[Whole]:
        found = await self._fleet.everywhere(name, method, forwarded, seconds=_LOOKING_SECONDS)
        if not found:
            raise NotReady(f"{name}: no replica answers")
        return found

    async def _live(self, request: Request, forwarded: Forwarded) -> Response:
        return JSONResponse({"status": "live"})

    async def _ready(self, request: Request, forwarded: Forwarded) -> Response:
        default = self._fleet.default
        if "model" in request.query_params:
            found = await self._all(default, "answer", forwarded)
            return _whole(next((one for one in found if one.status == 200), found[0]))
        faults = await self._fleet.everywhere(default, "fault", seconds=_HEALTH_SECONDS)
        if None not in faults:
            raise NotReady(str(faults[0]) if faults else f"{default}: no replica is ready")
        return JSONResponse({"status": "ready", "precision": default})

    async def _stats(self, request: Request, forwarded: Forwarded) -> Response:
        names = self._fleet.names
        found = await asyncio.gather(
            *(self._fleet.everywhere(name, "figures", forwarded, seconds=_LOOKING_SECONDS) for name in names)
        )
        parts = {name: figures for name, figures in zip(names, found, strict=True) if figures}
        if not parts:
            raise NotReady("no replica answers")
        first = next(iter(parts.values()))[0].answer
        return _whole(first) if first.status != 200 else JSONResponse(merged_stats(parts))

    async def _prometheus(self, request: Request, forwarded: Forwarded) -> Response:
        plain = replace(forwarded, headers=[one for one in forwarded.headers if one[0] != b"accept"])
        found = await asyncio.gather(
            *(
                self._fleet.everywhere(name, "exposition", plain, seconds=_LOOKING_SECONDS)
                for name in self._fleet.names
            )
        )
        pages = {replica: text for pages in found for replica, text in pages}
        return Response(self._metrics.merged(pages), media_type=PLAIN_TYPE)

    async def _precisions(self, request: Request, forwarded: Forwarded) -> Response:
        """Each precision as its own deployment sees it, the others as the default one does."""
        names = self._fleet.names
        found = await asyncio.gather(*(self._described(name, forwarded) for name in names))
        own = dict(zip(names, found, strict=True))
        default = own[self._fleet.default]
        if default is None:
            raise NotReady(f"{self._fleet.default}: no replica answers")
        if default.status != 200:
            return _whole(default)
        described = {name: None if one is None else json.loads(one.body) for name, one in own.items()}
        return JSONResponse([_own_entry(entry, described) for entry in json.loads(default.body)])

    async def _described(self, name: str, forwarded: Forwarded) -> Whole | None:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                answer: Whole = await self._fleet.call(name, "answer", forwarded)
        except (TimeoutError, ServiceError):
            return None
        return answer


def _own_entry(entry: dict[str, object], own: dict[str, list[dict[str, object]] | None]) -> dict[str, object]:
    name = entry["name"]
    if name not in own:
        return entry
    described = own[str(name)]
    if described is None:
        return {**entry, "state": "loading", "reason": "no replica is ready"}
    return next(one for one in described if one["name"] == name)


async def _response(answer: Awaitable[Response]) -> Response:
    return await answer


def _headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The request's headers, with the id that the router has given it."""
    kept = [(bytes(name), bytes(value)) for name, value in scope["headers"] if name != _OWN_ID]
    return [*kept, (_OWN_ID, scope["state"]["request_id"].encode())]


def _whole(answer: Whole) -> Response:
    response = Response(answer.body, answer.status)
    response.raw_headers = list(answer.headers)
    return response
