"""The ASGI app: routes, exception handlers, middleware in order, lifespan."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import loaders
import loaders.checkpoint
from loaders.base import Checkpoint, LoadedModel
from server.concurrency import cancelled
from server.errors import BadRequest, MethodNotAllowed, NotFound, ServiceError
from server.http.admission.admission_control import AdmissionControl
from server.http.auth import Auth
from server.http.connection.early_refusal import EarlyRefusal
from server.http.methods import HeadAsGet, allowed
from server.http.middleware import AdmissionMiddleware, BodyLimits, RequestContext
from server.http.openapi import describe
from server.http.redaction import Redaction
from server.http.responses import error_response
from server.http.route_facts import RouteTable
from server.routes import compare, favicon, generate, health, playground, precisions, report, stats, tokenize
from server.routes.openai import routes as openai
from server.served_model import Wanted
from server.service.watchdog import watch
from server.settings.server import Settings
from server.settings.types import AUTO
from server.state import AppState, build_state
from server.version import VERSION

_MODULES = (generate, openai, compare, report, tokenize, stats, precisions, health, favicon, playground)
_ROUTERS = (*(module.router for module in _MODULES), generate.root_router)
ROUTES = tuple(route for router in _ROUTERS for route in router.routes)
"""Every route of the service, in the order in which they are tried."""


def create_app(
    settings: Settings,
    *,
    first: Wanted | None = None,
    others: Sequence[Wanted] = (),
    open_checkpoint: Callable[..., Checkpoint] = loaders.checkpoint.open_checkpoint,
    load: Callable[..., LoadedModel] = loaders.load,
) -> FastAPI:
    """The app that serves one model or several. Nothing is read or loaded before its lifespan begins.

    Args:
        settings: the one instance that everything in the app holds; ``precision`` is resolved, not ``AUTO``.
        first: the default model; None: ``open_checkpoint`` opens that of ``settings``.
        others: the models beside it.
        open_checkpoint: (model id, revision) → ``Checkpoint``.
        load: loads one precision; same signature as ``loaders.load``.

    Raises:
        ValueError: ``settings.precision`` is ``AUTO``.
    """
    if settings.precision == AUTO:
        raise ValueError("resolve the precision 'auto' first: server.report.auto.resolve_default")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opened = partial(open_checkpoint, settings.model_id, settings.revision)
        state = await build_state([first or Wanted(opened, settings), *others], early_refusal, load)
        app.state = state  # type: ignore[assignment]  # typed: see state_of
        admission.places = state.places
        async with _running(state):
            yield

    app = _make_app(lifespan)
    routes = RouteTable(ROUTES)
    admission = AdmissionControl(Auth(app, settings, routes), settings, routes)
    early_refusal = _make_early_refusal(admission, settings)
    # the lifespan replaces them by an AppState
    app.state.settings, app.state.early_refusal = settings, early_refusal
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.router.routes.extend(ROUTES)  # include_router would analyse every endpoint again
    describe(app, settings, routes)
    _add_middleware(app, settings, admission, routes)
    return app


def _make_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    return FastAPIOffline(  # serves the scripts of /docs itself; FastAPI's page loads them from a CDN
        redoc_url=None,
        static_url="/docs/static",
        title="bitdial",
        version=VERSION,
        description="Causal language models in every precision, chosen per request.",
        lifespan=lifespan,
        redirect_slashes=False,
    )


@asynccontextmanager
async def _running(state: AppState) -> AsyncIterator[None]:
    """Starts what runs in the background, and stops it and the engines on exit."""
    models = state.models.values()
    tasks: list[asyncio.Task[None]] = []
    for model in models:
        model.pool.start()
        tasks.append(asyncio.create_task(watch(model.pool, state.lifecycle, state.settings.hang_timeout)))
        if model.shadow is not None:
            tasks.append(asyncio.create_task(model.shadow.run()))
    if state.telemetry is not None:
        tasks.append(asyncio.create_task(state.telemetry.run()))
    try:
        yield
    finally:
        await cancelled(*tasks)
        for model in models:
            await model.stop()
        if state.telemetry is not None:
            await state.telemetry.close()


def _make_early_refusal(admission: AdmissionControl, settings: Settings) -> EarlyRefusal:
    if settings.otlp_endpoint is None:
        return EarlyRefusal(admission, settings)
    from server.observability.otlp.trace_context import trace_context  # needs an extra

    return EarlyRefusal(admission, settings, trace_context)


def _add_middleware(
    app: FastAPI, settings: Settings, admission: AdmissionControl, routes: RouteTable
) -> None:
    """Adds the middleware, innermost first."""
    app.add_middleware(HeadAsGet)
    app.add_middleware(AdmissionMiddleware, admission=admission)
    if settings.otlp_endpoint is not None:
        from server.observability.otlp.trace_context import TraceContext  # needs an extra

        app.add_middleware(TraceContext, redaction=Redaction(settings.secrets()))
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(Auth, settings=settings, routes=routes)
    if settings.cors_allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send headers of their own; no header identifies a user
            expose_headers=["X-Precision", "X-Request-ID", "Retry-After"],
        )
    app.add_middleware(RequestContext, settings=settings, routes=routes)


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(error, request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors, in the dialect of the path."""
    assert isinstance(error, HTTPException)
    headers: Mapping[str, Any] = error.headers or {}
    if error.status_code == 405:
        # app.routes lacks the routes of mounted apps
        headers = {**headers, "Allow": allowed(request.app.routes, request.scope) or headers.get("Allow", "")}
    return error_response(_translated(error.status_code), request.scope, headers)


def _translated(status: int) -> ServiceError:
    if status == 404:
        return NotFound("no such route here")
    if status == 405:
        return MethodNotAllowed("this route does not take that method")
    return BadRequest("the request can't be understood")
