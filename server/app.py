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
from server.auth import Auth
from server.description import describe
from server.errors import BadRequest, MethodNotAllowed, NotFound, ServiceError
from server.generation import Service
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.middleware import BodyLimits, Envelope
from server.pool import Pool
from server.replies import error_response
from server.routes import compare, generate, health, openai, precisions, stats, tokenize
from server.settings import Settings
from server.text import TextCodec
from server.version import VERSION
from server.watchdog import watch

if TYPE_CHECKING:
    from server.tracing import Tracing


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
        await _furnish(app, settings, open_checkpoint, load)
        app.state.pool.start()
        watchdog = asyncio.create_task(watch(app.state.pool, app.state.lifecycle, settings.hang_timeout))
        try:
            yield
        finally:
            watchdog.cancel()
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
    for module in (generate, openai, compare, tokenize, stats, precisions, health):
        app.include_router(module.router)
    app.include_router(generate.root_router)
    describe(app, settings)
    _surround(app, settings)
    return app


async def _furnish(
    app: FastAPI,
    settings: Settings,
    open_checkpoint: Callable[..., Checkpoint],
    load: Callable[..., LoadedModel],
) -> None:
    state = app.state
    state.started = time.time()
    state.checkpoint = await asyncio.to_thread(open_checkpoint, settings.model_id, settings.revision)
    tokenizer = await asyncio.to_thread(loaders.checkpoint.load_tokenizer, state.checkpoint)
    state.codec = TextCodec(tokenizer)
    state.lifecycle, state.metrics = Lifecycle(), Metrics(state.checkpoint.model_id)
    state.pool = Pool(state.checkpoint, settings, load=load, metrics=state.metrics, lifecycle=state.lifecycle)
    state.tracing = _trace(settings, state.metrics, state.checkpoint)
    observer = state.tracing or state.metrics
    state.comparing = asyncio.Lock()
    state.service = Service(settings, state.checkpoint, state.codec, state.pool, observer, state.lifecycle)


def _trace(settings: Settings, metrics: Metrics, checkpoint: Checkpoint) -> "Tracing | None":
    if settings.otlp_endpoint is None:
        return None
    from server.tracing import Tracing  # needs an extra

    return Tracing(metrics, settings.otlp_endpoint, checkpoint.model_id)


def _surround(app: FastAPI, settings: Settings) -> None:
    """Middleware, the innermost first."""
    if settings.otlp_endpoint is not None:
        from server.tracing import TraceContext  # needs an extra

        app.add_middleware(TraceContext)
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(Auth, settings=settings)
    if settings.cors_allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients have their own beside ours; none is taken for an identity
            expose_headers=["X-Precision", "X-Request-ID", "Retry-After"],
        )
    app.add_middleware(Envelope)


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(error, request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals, in the dialect of the path."""
    assert isinstance(error, HTTPException)
    headers: Mapping[str, Any] = error.headers or {}
    return error_response(_translated(error.status_code), request.scope, headers)


def _translated(status: int) -> ServiceError:
    if status == 404:
        return NotFound("no such route")
    if status == 405:
        return MethodNotAllowed("this route does not take that method")
    return BadRequest("the request can't be understood")
