"""The objects of the running app: built by the lifespan, read by routes through ``state_of``."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from loaders.base import LoadedModel
from server.http.connection.early_refusal import EarlyRefusal
from server.lifecycle import Lifecycle
from server.observability.otlp.environment import log_ignored
from server.served_model import ServedModel, Wanted, build_models
from server.service.admission import Places
from server.service.generation import GenerationService
from server.service.pool import Pool
from server.settings.server import Settings

if TYPE_CHECKING:
    from server.observability.otlp.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class AppState:
    """``app.state`` once the lifespan runs; before, it has ``settings`` and ``early_refusal`` alone."""

    settings: Settings
    """Those of the server and of its default model; ``precision`` is never ``AUTO``."""
    early_refusal: EarlyRefusal
    """Read by ``ServerConfig``."""
    lifecycle: Lifecycle
    telemetry: "Telemetry | None"
    """None if no collector is configured."""
    models: Mapping[str, ServedModel]
    """By name, the default one first."""
    comparing: asyncio.Lock
    """Held by the running comparison: one at a time."""
    started: float
    """The start time of the server, in seconds since the epoch."""
    started_monotonic: float
    """The same moment on the monotonic clock, which is never set."""

    @property
    def default(self) -> ServedModel:
        """The model of requests that name none."""
        return next(iter(self.models.values()))

    @property
    def pool(self) -> Pool:
        """The default model's."""
        return self.default.pool

    @property
    def service(self) -> GenerationService:
        """The default model's."""
        return self.default.service

    @property
    def places(self) -> Places:
        return self.service.places

    def uptime(self) -> float:
        """Seconds since ``started``."""
        return time.monotonic() - self.started_monotonic

    @property
    def in_flight(self) -> int:
        """Places taken by requests."""
        return self.places.in_flight

    def fail_running(self, reason: str) -> None:
        """Ends all running and waiting sequences with an error."""
        for model in self.models.values():
            for engine in model.pool.engines:
                engine.fail(reason)


def state_of(app: Starlette) -> AppState:
    """The typed ``app.state`` of an app whose lifespan has begun."""
    state: object = app.state
    assert isinstance(state, AppState)
    return state


async def build_state(
    wanted: Sequence[Wanted],
    early_refusal: EarlyRefusal,
    load: Callable[..., LoadedModel],
) -> AppState:
    """Opens the checkpoints and builds everything around them; loads no precision.

    Args:
        wanted: the models, the default one first.

    Raises:
        LoaderError: a checkpoint or its tokenizer can't be read.
    """
    started, started_monotonic = time.time(), time.monotonic()
    lifecycle, telemetry = Lifecycle(), _make_telemetry(wanted[0].settings)
    models = await build_models(wanted, lifecycle, load, telemetry)
    return AppState(
        started=started,
        started_monotonic=started_monotonic,
        settings=wanted[0].settings,
        early_refusal=early_refusal,
        lifecycle=lifecycle,
        telemetry=telemetry,
        models={model.name: model for model in models},
        comparing=asyncio.Lock(),
    )


def _make_telemetry(settings: Settings) -> "Telemetry | None":
    log_ignored(os.environ, settings.otlp_endpoint is not None)
    if settings.otlp_endpoint is None:
        return None
    from server.observability.otlp.telemetry import Telemetry  # needs an extra

    return Telemetry(settings.otlp_endpoint)
