"""A replica: one process of a deployment, which serves the app of a single host with one precision loaded."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve

from loaders.errors import LoaderError
from server.app import create_app
from server.errors import ServiceError
from server.observability.logs import set_up_logging
from server.observability.record import Record
from server.ray.compared import ComparedOrError, ReferenceRun, compare_with, run_reference
from server.ray.configuration import assigned, replica_settings
from server.ray.exchange import Forwarded, Head, Whole, collected, exchange
from server.ray.models import wanted
from server.report.auto import bounds_of, choose_by_report
from server.report.choice import Bounds, Choice
from server.routes.precision_choice import choose_model
from server.settings.server import Settings
from server.state import AppState, state_of

_log = logging.getLogger("server.ray")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Figures:
    """One replica's ``/stats``, and the values behind its percentiles."""

    answer: Whole
    records: Mapping[str, Record]


class Replica:
    """What Ray Serve constructs in each process of a deployment.

    Args:
        precision: the one that it loads at its start, and its app's default.
        application: the settings that the application was built with, without defaults.
        choice: why the report chose the application's default precision, if it did and this is it.
    """

    def __init__(self, precision: str, application: Mapping[str, Any], choice: Choice | None = None) -> None:
        self._precision, self._application, self._choice = precision, application, choice
        self._settings: Settings | None = None
        self._app: FastAPI | None = None
        self._running = AsyncExitStack()
        self._ready = asyncio.Event()
        self._in_use = 0

    async def reconfigure(self, user_config: Mapping[str, Any] | None, rank: Any = None) -> None:
        """Serves by the settings in ``user_config`` from now on.

        Ray calls it at the start and after each change. Requests that arrive meanwhile wait; running ones may
        finish first, for GRACEFUL_TERMINATION_TIMEOUT.

        Args:
            rank: unused. Ray Serve calls this without a ``user_config`` only if there is this parameter.

        Raises:
            ValueError: not valid; the replica goes on as before.
            RuntimeError: the precision can't be loaded.
        """
        settings = replica_settings(self._application, user_config or {}, self._precision, assigned())
        if settings == self._settings:
            return
        set_up_logging(settings.json_output, settings.log_level, settings.secrets())
        self._ready.clear()
        await self._stop()
        try:
            await self._start(settings)
        except (LoaderError, ServiceError) as error:  # `serve status` shows it with its traceback
            raise RuntimeError(str(error)) from None
        self._ready.set()

    async def _start(self, settings: Settings) -> None:
        first, *others = wanted(settings, self._choice)
        app = create_app(settings, first=first, others=others)
        await self._running.enter_async_context(app.router.lifespan_context(app))
        state = state_of(app)
        while state.pool.state(self._precision).engine is None:
            if state.lifecycle.fatal is not None:
                raise RuntimeError(state.lifecycle.fatal)
            await asyncio.sleep(_POLL_SECONDS)
        self._app, self._settings = app, settings

    async def _stop(self) -> None:
        """Lets running requests finish within the grace time, then stops the app."""
        if self._app is None or self._settings is None:
            return
        try:
            async with asyncio.timeout(self._settings.graceful_termination_timeout):
                while self._in_use:
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            state_of(self._app).fail_running("the replica is shutting down")
        self._app = self._settings = None
        await self._running.aclose()
        self._running = AsyncExitStack()

    async def __del__(self) -> None:  # awaited by Ray Serve when the replica has drained
        await self._stop()

    @asynccontextmanager
    async def _use(self) -> AsyncGenerator[FastAPI]:
        """The app, once it is there."""
        await self._ready.wait()
        assert self._app is not None
        self._in_use += 1
        try:
            yield self._app
        finally:
            self._in_use -= 1

    async def check_health(self) -> None:
        """Raises: RuntimeError: the worker is dead or hangs. Ray replaces the replica then."""
        if self._app is not None and (fault := _fault(state_of(self._app), self._precision)) is not None:
            raise RuntimeError(fault)

    async def fault(self) -> str | None:
        """Why the replica is not ready; None if it is."""
        if self._app is None:
            return f"{self._precision} is loading"
        return _fault(state_of(self._app), self._precision)

    async def models(self, request: Forwarded) -> list[str]:
        """The names of the served checkpoints."""
        async with self._use() as app:
            return list(state_of(app).models)

    async def relay(self, request: Forwarded) -> AsyncGenerator[Head | bytes]:
        """The app's response in pieces. Closing the generator cancels the request."""
        async with self._use() as app, aclosing(exchange(app, request)) as items:
            async for item in items:
                yield item

    async def answer(self, request: Forwarded) -> Whole:
        """The app's whole response."""
        async with self._use() as app:
            return await collected(app, request)

    async def figures(self, request: Forwarded) -> Figures:
        """The app's ``/stats``."""
        async with self._use() as app:
            answer = await collected(app, request)
            found = choose_model(request.request(app)).metrics.records() if answer.status == 200 else {}
            return Figures(answer, found)

    async def exposition(self, request: Forwarded) -> tuple[str, str]:
        """The replica's name, and its ``/metrics``."""
        return serve.get_replica_context().replica_tag, (await self.answer(request)).body.decode()

    async def choose(self, request: Forwarded, bounds: Mapping[str, Any] | None) -> str | None:
        """The precision that ``auto`` is with these bounds; None if the app's own answer is an error."""
        async with self._use() as app:
            try:
                model = choose_model(request.request(app))
                asked = bounds_of(model.settings) if bounds is None else Bounds(**bounds)
                return choose_by_report(model.reports, model.pool.able, asked).precision
            except (ServiceError, TypeError, ValueError):
                return None

    async def run_reference(
        self, request: Forwarded, deployed: tuple[str, ...]
    ) -> ReferenceRun | ServiceError:
        """The reference's part of ``/compare``."""
        async with self._use() as app:
            return await run_reference(app, request, deployed)

    async def compare_with(self, request: Forwarded, run: ReferenceRun, precision: str) -> ComparedOrError:
        """Another precision's part of ``/compare``."""
        async with self._use() as app:
            return await compare_with(state_of(app).models[run.model], run, precision)


def _fault(state: AppState, precision: str) -> str | None:
    if state.lifecycle.fatal is not None:
        return f"the server has failed: {state.lifecycle.fatal}"
    engine = state.pool.state(precision).engine
    if engine is None:
        return f"{precision} is {state.pool.state(precision).state}"
    fault = engine.health()
    return None if fault is None else f"{precision}: {fault}"
