"""One model of the app: its checkpoint in every precision, and what serves it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import loaders.checkpoint
from loaders.base import Checkpoint, LoadedModel
from loaders.end_tokens import with_end_token
from server.activity import Activity
from server.evaluation.quantization_report import QuantizationReports
from server.evaluation.shadow import Shadow
from server.lifecycle import Lifecycle
from server.observability.ended import Observer
from server.observability.metrics import Metrics
from server.report.background import Reports
from server.report.choice import Choice
from server.service.admission import Places
from server.service.chat.renderer import ChatRenderer
from server.service.chat.source import make_renderer
from server.service.gauges import set_gauges
from server.service.generation import GenerationService
from server.service.host_resources import HostResources
from server.service.pool import Pool
from server.service.text.codec import TextCodec
from server.settings.server import Settings

if TYPE_CHECKING:
    from server.observability.otlp.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What reports and shadow are built on."""

    name: str
    settings: Settings
    """The app's, with this model's ``model_id`` and precisions; ``precision`` is never ``AUTO``."""
    default_choice: Choice | None
    """Why the report chose ``settings.precision``, if it did."""
    checkpoint: Checkpoint
    codec: TextCodec
    chat: ChatRenderer | None
    """None if the model has no chat template."""
    metrics: Metrics
    pool: Pool
    service: GenerationService


@dataclass(frozen=True, kw_only=True)
class ServedModel(_Opened):
    """Built by the lifespan; of several models in an app each has its own."""

    reports: Reports
    quantization_reports: QuantizationReports
    shadow: Shadow | None

    async def stop(self) -> None:
        """Stops what runs in the background, then the engines."""
        await self.reports.stop()
        if self.chat is not None:
            await self.chat.stop()
        self.service.prompts.close()
        await self.pool.stop()


@dataclass(frozen=True)
class Wanted:
    """A model to serve.

    Args:
        open: its checkpoint; may raise ``LoaderError``.
        settings: the app's, with this model's ``model_id`` and precisions.
        default_choice: why the report chose ``settings.precision``, if it did.
        name: None: the checkpoint's own.
    """

    open: Callable[[], Checkpoint]
    settings: Settings
    default_choice: Choice | None = None
    name: str | None = None


async def build_models(
    wanted: Sequence[Wanted],
    lifecycle: Lifecycle,
    load: Callable[..., LoadedModel],
    telemetry: "Telemetry | None" = None,
) -> list[ServedModel]:
    """Opens the checkpoints, the default one first, and builds everything around them; loads no precision.

    Args:
        telemetry: gets traces and metrics of all of them; None: no collector is configured.

    Raises:
        LoaderError: a checkpoint or its tokenizer can't be read.
    """
    first = wanted[0].settings
    host = HostResources(first)
    opened: list[_Opened] = []
    places: Places | None = None
    for one in wanted:
        checkpoint = await asyncio.to_thread(one.open)
        tokenizer = await asyncio.to_thread(loaders.checkpoint.load_tokenizer, checkpoint)
        metrics = Metrics(one.name or checkpoint.model_id)
        observer = metrics if telemetry is None else telemetry.add(metrics)
        places = places or Places(first.max_concurrent_requests, lifecycle, host, observer)
        opened.append(_open(one, checkpoint, tokenizer, metrics, observer, places, host, lifecycle, load))
    activity = Activity(*(one.service for one in opened), *(one.pool for one in opened))
    models = [await _with_evaluation(one, activity, is_default=one is opened[0]) for one in opened]
    shadows = [model.shadow for model in models if model.shadow is not None]
    if places is not None and shadows:
        places.on_arrival = partial(_tell, shadows)
    return models


def _tell(shadows: Sequence[Shadow]) -> None:
    for shadow in shadows:
        shadow.arrival()


def _open(
    wanted: Wanted,
    opened: Checkpoint,
    tokenizer: Any,
    metrics: Metrics,
    observer: Observer,
    places: Places,
    host: HostResources,
    lifecycle: Lifecycle,
    load: Callable[..., LoadedModel],
) -> _Opened:
    settings = wanted.settings
    checkpoint, codec = with_end_token(opened, tokenizer), TextCodec(tokenizer)
    chat = make_renderer(tokenizer, settings.chat_template, settings.payload_limit)
    name = wanted.name or checkpoint.model_id
    pool = Pool(checkpoint, settings, load=load, metrics=metrics, lifecycle=lifecycle, host=host)
    service = GenerationService(settings, checkpoint, codec, pool, observer, places, chat)
    metrics.refresh = partial(set_gauges, metrics, pool)
    return _Opened(
        name=name,
        settings=settings,
        default_choice=wanted.default_choice,
        checkpoint=checkpoint,
        codec=codec,
        chat=chat,
        metrics=metrics,
        pool=pool,
        service=service,
    )


async def _with_evaluation(opened: _Opened, activity: Activity, is_default: bool) -> ServedModel:
    settings, pool = opened.settings, opened.pool
    asked_as = None if is_default else opened.name
    reports = Reports(settings, opened.checkpoint, activity, asked_as)
    await reports.find_subject()
    shadow = None
    if settings.shadow_precision is not None:
        shadow = Shadow(settings.shadow_precision, settings, pool, opened.metrics, activity)
        opened.service.on_success = shadow.finished
    return ServedModel(
        **vars(opened), reports=reports, quantization_reports=QuantizationReports(pool), shadow=shadow
    )
