"""The application: what it holds, what it answers, and in what order a request passes through."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import loaders
import loaders.checkpoint
from loaders.base import Checkpoint, LoadedModel
from loaders.end_tokens import with_end_token
from server.errors import BadRequest, MethodNotAllowed, NotFound, ServiceError
from server.evaluation.quantization_report import QuantizationReports
from server.evaluation.shadow import Shadow
from server.http.admission.admission_control import AdmissionControl
from server.http.auth import Auth
from server.http.connection.early_refusal import EarlyRefusal
from server.http.methods import HeadAsGet, allowed
from server.http.middleware import AdmissionMiddleware, BodyLimits, RequestContext
from server.http.openapi import describe
from server.http.responses import error_response
from server.http.route_facts import RouteTable
from server.lifecycle import Lifecycle
from server.observability.metrics import Metrics
from server.report.auto import resolved
from server.report.background import Reports
from server.routes import compare, favicon, generate, health, precisions, report, stats, tokenize
from server.routes.openai import routes as openai
from server.service.chat.source import make_renderer
from server.service.generation import GenerationService
from server.service.pool import Pool
from server.service.text.codec import TextCodec
from server.service.watchdog import watch
from server.settings.server import Settings
from server.version import VERSION

if TYPE_CHECKING:
    from server.observability.tracing import Tracing

_MODULES = (generate, openai, compare, report, tokenize, stats, precisions, health, favicon)
_ROUTERS = (*(module.router for module in _MODULES), generate.root_router)
ROUTES = tuple(route for router in _ROUTERS for route in router.routes)
"""Every route of the service, in the order in which they are tried."""


def create_app(
    settings: Settings,
    *,
    open_checkpoint: Callable[..., Checkpoint] = loaders.checkpoint.open_checkpoint,
    load: Callable[..., LoadedModel] = loaders.load,
) -> FastAPI:
    """The service for one model. Nothing is read or loaded before its lifespan begins.

    Args:
        settings: how to serve.
        open_checkpoint: finds the model: (model id, revision) → ``Checkpoint``.
        load: loads one precision of it; as ``loaders.load``.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await _build_state(app, settings, open_checkpoint, load)
        app.state.pool.start()
        tasks = [asyncio.create_task(watch(app.state.pool, app.state.lifecycle, settings.hang_timeout))]
        if app.state.shadow is not None:
            tasks.append(asyncio.create_task(app.state.shadow.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await app.state.reports.stop()
            if app.state.chat is not None:
                await app.state.chat.stop()
            app.state.service.prompts.close()
            await app.state.pool.stop()
            if app.state.tracing is not None:
                await app.state.tracing.close()

    app = FastAPIOffline(  # /docs with its scripts at hand: FastAPI's own page fetches them from elsewhere
        redoc_url=None,
        static_url="/docs/static",
        title="bitdial",
        version=VERSION,
        description="One causal language model in every precision, chosen per request.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    for router in _ROUTERS:
        app.include_router(router)
    routes = RouteTable(ROUTES)
    describe(app, settings, routes)
    _add_middleware(app, settings, routes)
    return app


async def _build_state(
    app: FastAPI,
    settings: Settings,
    open_checkpoint: Callable[..., Checkpoint],
    load: Callable[..., LoadedModel],
) -> None:
    state = app.state
    state.started = time.time()
    state.checkpoint = await asyncio.to_thread(open_checkpoint, settings.model_id, settings.revision)
    tokenizer = await asyncio.to_thread(loaders.checkpoint.load_tokenizer, state.checkpoint)
    state.checkpoint = with_end_token(state.checkpoint, tokenizer)
    state.codec = TextCodec(tokenizer)
    state.chat = make_renderer(tokenizer, settings.chat_template, settings.payload_limit)
    state.reports = Reports(settings, state.checkpoint, lambda: _is_busy(app) or _is_replaying(app))
    await state.reports.find_subject()
    settings, state.default_choice = resolved(settings, state.reports)
    state.lifecycle, state.metrics = Lifecycle(), Metrics(state.checkpoint.model_id)
    state.pool = Pool(state.checkpoint, settings, load=load, metrics=state.metrics, lifecycle=state.lifecycle)
    state.tracing = _trace(settings, state.metrics, state.checkpoint)
    observer = state.tracing or state.metrics
    state.comparing, state.proofs = asyncio.Lock(), QuantizationReports(state.pool)
    state.service = GenerationService(
        settings, state.checkpoint, state.codec, state.pool, observer, state.lifecycle, state.chat
    )
    state.shadow = _shadow(app, settings)


def _shadow(app: FastAPI, settings: Settings) -> Shadow | None:
    state = app.state
    if settings.shadow_precision is None:
        return None
    shadow = Shadow(settings.shadow_precision, settings, state.pool, state.metrics, lambda: _is_busy(app))
    state.service.on_arrival, state.service.on_success = shadow.arrival, shadow.finished
    return shadow


def _is_replaying(app: FastAPI) -> bool:
    return app.state.shadow is not None and app.state.shadow.active


def _is_busy(app: FastAPI) -> bool:
    """Whether a request runs or waits, or a precision is being loaded."""
    states = app.state.pool.states()
    return app.state.service.in_flight > 0 or any(one.state == "loading" for one in states)


def _trace(settings: Settings, metrics: Metrics, checkpoint: Checkpoint) -> "Tracing | None":
    if settings.otlp_endpoint is None:
        return None
    from server.observability.tracing import Tracing  # needs an extra

    return Tracing(metrics, settings.otlp_endpoint, checkpoint.model_id)


def _add_middleware(app: FastAPI, settings: Settings, routes: RouteTable) -> None:
    """Middleware, the innermost first."""
    app.add_middleware(HeadAsGet)
    app.state.admission = AdmissionControl(app.state, Auth(app, settings, routes), settings, routes)
    app.add_middleware(AdmissionMiddleware, admission=app.state.admission)
    if settings.otlp_endpoint is None:
        app.state.early_refusal = EarlyRefusal(app.state.admission, settings)
    else:
        from server.observability.tracing import TraceContext, trace_context  # needs an extra

        app.state.early_refusal = EarlyRefusal(app.state.admission, settings, trace_context)
        app.add_middleware(TraceContext)
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(Auth, settings=settings, routes=routes)
    if settings.cors_allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients have their own beside ours; none is taken for an identity
            expose_headers=["X-Precision", "X-Request-ID", "Retry-After"],
        )
    app.add_middleware(RequestContext, settings=settings, routes=routes)


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(error, request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals, in the dialect of the path."""
    assert isinstance(error, HTTPException)
    headers: Mapping[str, Any] = error.headers or {}
    if error.status_code == 405:
        # a mounted app's own routes are not among these
        headers = {**headers, "Allow": allowed(request.app.routes, request.scope) or headers.get("Allow", "")}
    return error_response(_translated(error.status_code), request.scope, headers)


def _translated(status: int) -> ServiceError:
    if status == 404:
        return NotFound("no such route here")
    if status == 405:
        return MethodNotAllowed("this route does not take that method")
    return BadRequest("the request can't be understood")
