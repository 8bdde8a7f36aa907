"""The objects of the running app: built by the lifespan, read by routes through ``state_of``."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from starlette.applications import Starlette

import loaders.checkpoint
from loaders.base import Checkpoint, LoadedModel
from loaders.end_tokens import with_end_token
from server.activity import Activity
from server.evaluation.quantization_report import QuantizationReports
from server.evaluation.shadow import Shadow
from server.http.connection.early_refusal import EarlyRefusal
from server.lifecycle import Lifecycle
from server.observability.metrics import Metrics
from server.report.background import Reports
from server.report.choice import Choice
from server.service.chat.renderer import ChatRenderer
from server.service.chat.source import make_renderer
from server.service.gauges import set_gauges
from server.service.generation import GenerationService
from server.service.pool import Pool
from server.service.text.codec import TextCodec
from server.settings.server import Settings

if TYPE_CHECKING:
    from server.observability.otlp.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class AppState:
    """``app.state`` once the lifespan runs; before, it has ``settings`` and ``early_refusal`` alone."""

    settings: Settings
    """The only ``Settings`` of the app; ``precision`` is never ``AUTO``."""
    default_choice: Choice | None
    """Why the report chose ``settings.precision``, if it did."""
    early_refusal: EarlyRefusal
    """Read by ``ServerConfig``."""
    checkpoint: Checkpoint
    codec: TextCodec
    chat: ChatRenderer | None
    """None if the model has no chat template."""
    lifecycle: Lifecycle
    metrics: Metrics
    telemetry: "Telemetry | None"
    """None if no collector is configured."""
    pool: Pool
    service: GenerationService
    reports: Reports
    quantization_reports: QuantizationReports
    shadow: Shadow | None
    comparing: asyncio.Lock
    """Held by the running comparison: one at a time."""
    started: float
    """The start time of the server, in seconds since the epoch."""
    started_monotonic: float
    """The same moment on the monotonic clock, which is never set."""

    def uptime(self) -> float:
        """Seconds since ``started``."""
        return time.monotonic() - self.started_monotonic

    @property
    def in_flight(self) -> int:
        """Places taken by requests."""
        return self.service.places.in_flight

    def fail_running(self, reason: str) -> None:
        """Ends all running and waiting sequences with an error."""
        for engine in self.pool.engines:
            engine.fail(reason)


def state_of(app: Starlette) -> AppState:
    """The typed ``app.state`` of an app whose lifespan has begun."""
    state: object = app.state
    assert isinstance(state, AppState)
    return state


async def build_state(
    settings: Settings,
    default_choice: Choice | None,
    early_refusal: EarlyRefusal,
    open_checkpoint: Callable[..., Checkpoint],
    load: Callable[..., LoadedModel],
) -> AppState:
    """Opens the checkpoint and builds everything around it; loads no precision.

    Raises:
        LoaderError: the checkpoint or its tokenizer can't be read.
    """
    started, started_monotonic = time.time(), time.monotonic()
    opened = await asyncio.to_thread(open_checkpoint, settings.model_id, settings.revision)
    tokenizer = await asyncio.to_thread(loaders.checkpoint.load_tokenizer, opened)
    checkpoint, codec = with_end_token(opened, tokenizer), TextCodec(tokenizer)
    chat = make_renderer(tokenizer, settings.chat_template, settings.payload_limit)
    lifecycle, metrics = Lifecycle(), Metrics(checkpoint.model_id)
    telemetry = _make_telemetry(settings, metrics, checkpoint)
    observer = metrics if telemetry is None else telemetry.tracing
    pool = Pool(checkpoint, settings, load=load, metrics=metrics, lifecycle=lifecycle)
    metrics.refresh = partial(set_gauges, metrics, pool)
    service = GenerationService(settings, checkpoint, codec, pool, observer, lifecycle, chat)
    activity = Activity(service, pool)
    reports = Reports(settings, checkpoint, activity)
    await reports.find_subject()
    return AppState(
        started=started,
        started_monotonic=started_monotonic,
        settings=settings,
        default_choice=default_choice,
        early_refusal=early_refusal,
        checkpoint=checkpoint,
        codec=codec,
        chat=chat,
        lifecycle=lifecycle,
        metrics=metrics,
        telemetry=telemetry,
        pool=pool,
        service=service,
        reports=reports,
        comparing=asyncio.Lock(),
        quantization_reports=QuantizationReports(pool),
        shadow=_make_shadow(settings, pool, metrics, service, activity),
    )


def _make_telemetry(settings: Settings, metrics: Metrics, checkpoint: Checkpoint) -> "Telemetry | None":
    if settings.otlp_endpoint is None:
        return None
    from server.observability.otlp.telemetry import Telemetry  # needs an extra

    return Telemetry(metrics, settings.otlp_endpoint, checkpoint.model_id)


def _make_shadow(
    settings: Settings, pool: Pool, metrics: Metrics, service: GenerationService, activity: Activity
) -> Shadow | None:
    if settings.shadow_precision is None:
        return None
    shadow = Shadow(settings.shadow_precision, settings, pool, metrics, activity)
    service.places.on_arrival, service.on_success = shadow.arrival, shadow.finished
    return shadow
