"""Precision → engine: each is loaded once, on a thread of its own, within the memory budget."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

import loaders
from loaders.base import Checkpoint, LoadedModel, ModelSpec
from loaders.errors import LoaderError
from loaders.footprint import quantization_warning
from server.concurrency import run_for_future
from server.engine.engine import Engine
from server.errors import NotReady, ServiceError
from server.host import memory
from server.host.threads import compute_with
from server.lifecycle import Lifecycle
from server.observability.metrics import Metrics
from server.service.host_resources import HostResources
from server.service.precision_state import Lease, LoadProgress, PrecisionState, first_state, forward_pass
from server.service.upkeep import load_first, unload_idle
from server.settings.server import Settings

Load = Callable[[str, ModelSpec, Callable[[str, int, int], None]], LoadedModel]
_RETRY_SECONDS = 5.0  # between a failed load and the next try
_STOP_SECONDS = 5.0  # for an engine to finish its step
_log = logging.getLogger(__name__)


class Pool:
    """All precisions of one checkpoint. Event loop only.

    Args:
        host: shared with the pools of other checkpoints. The default precision of the first pool is never
            unloaded. None: this is the only one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        *,
        load: Load = loaders.load,
        metrics: Metrics,
        lifecycle: Lifecycle,
        host: HostResources | None = None,
    ) -> None:
        self.spec = settings.spec(checkpoint, settings.max_batch_size)
        self.host = HostResources(settings) if host is None else host
        self.host.pools.append(self)
        self.device = self.spec.device
        self.threads = settings.resolved_threads()
        """CPU threads of each load and each step."""
        self.default = settings.precision
        self._settings, self._load_model = settings, load
        self._metrics, self._lifecycle = metrics, lifecycle
        self._states = {
            name: first_state(name, loaders.offered(name, self.spec), name in self.first)
            for name in loaders.PRECISIONS
        }
        self._loads: dict[str, asyncio.Task[Engine]] = {}
        self._background: list[asyncio.Task[None]] = []

    def state(self, precision: str) -> PrecisionState:
        return self._states[loaders.canonical(precision)]

    def states(self) -> list[PrecisionState]:
        return list(self._states.values())

    @property
    def able(self) -> frozenset[str]:
        """The precisions that this host can run."""
        return frozenset(state.name for state in self._states.values() if state.state != "unavailable")

    @property
    def engines(self) -> list[Engine]:
        return [state.engine for state in self._states.values() if state.engine is not None]

    def is_busy(self) -> bool:
        """Whether a precision is being loaded."""
        return any(state.state == "loading" for state in self._states.values())

    def use(self, precision: str) -> Lease:
        """A lease of the engine, which is loaded if necessary and not unloaded as idle while it is held.

        Acquiring raises:
            Unavailable: this host can't run it.
            NotReady: loading failed, or there is no room.
        """
        return Lease(self.state(precision), self._loaded)

    async def preload(self, precision: str) -> None:
        """Loads a precision if there is room for it: unlike ``use`` it unloads no other.

        Raises: as acquiring what ``use`` returns.
        """
        await self._loaded(self.state(precision), makes_room=False)

    async def _loaded(self, state: PrecisionState, makes_room: bool = True) -> Engine:
        if state.state == "unavailable":
            raise state.refusal()
        if state.state == "failed" and time.monotonic() - state.failed_at < _RETRY_SECONDS:
            raise self._failure(state)
        if state.name not in self._loads:
            task = self._loads[state.name] = asyncio.create_task(self._load(state, makes_room))
            task.add_done_callback(_retrieve_exception)
        # shielded: cancelling one waiting request must not cancel the load for the others
        return await asyncio.shield(self._loads[state.name])

    async def _load(self, state: PrecisionState, makes_room: bool) -> Engine:
        state.state, state.reason = "loading", None
        state.progress = LoadProgress("waiting", 0, 0)
        try:
            async with self.host.loading:
                self.spec = await self.host.kv_memory.within(self.spec)
                needed = memory.needed_bytes(state.name, self.spec)
                await self.host.make_room(self.title(state), needed, unload=makes_room)
                model = await self._in_thread(state)
                engine = self._engine_of(model)
                await engine.start()  # on a GPU this captures graphs, whose memory counts too
        except Exception as error:
            state.state, state.failed_at = "failed", time.monotonic()
            expected = isinstance(error, LoaderError | ServiceError)
            state.reason = str(error) if expected else type(error).__name__  # clients see no more of a bug
            traceback = None if expected else error
            _log.warning("%s could not be loaded: %s", self.title(state), state.reason, exc_info=traceback)
            if isinstance(error, NotReady):
                state.state = "unloaded"  # there may be room later
                raise state.failure(error.message, error.retry_after) from error
            raise self._failure(state) from error
        finally:
            self._loads.pop(state.name, None)
        state.engine, state.state, state.load_seconds = engine, "loaded", model.load_seconds
        self._metrics.set_loaded(state.name, memory.by_kind(model), model.load_seconds)
        if (warning := quantization_warning(model)) is not None:
            _log.warning("%s", warning)
        facts = f"{model.load_seconds:.1f} s, {memory.used_bytes(model)} bytes"
        _log.info("%s loaded in %s; forward pass: %s", self.title(state), facts, forward_pass(model))
        return engine

    def title(self, state: PrecisionState) -> str:
        """For errors and the log: with the model's name if there are several."""
        return state.name if len(self.host.pools) == 1 else f"{self._metrics.model}:{state.name}"

    def _failure(self, state: PrecisionState) -> NotReady:
        reason = f"{self.title(state)} could not be loaded: {state.reason}"
        return state.failure(reason, _RETRY_SECONDS)

    def _engine_of(self, model: LoadedModel) -> Engine:
        return Engine(
            model,
            eos_ids=self.spec.checkpoint.eos_ids,
            prefill_chunk=self._settings.prefill_chunk,
            prefill_chunk_busy=self._settings.busy_chunk(),
            threads=self.threads,
            on_step=partial(self._metrics.observe_step, model.precision),
            on_death=self._lifecycle.fail,
            lock=self.host.turn,
        )

    async def _in_thread(self, state: PrecisionState) -> LoadedModel:
        """Loads on a daemon thread: a load can't be interrupted and must not keep the process alive."""
        future: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
        spec = memory.within(self._settings.memory_budget, self.host.used_bytes(), self.spec)

        def tell(stage: str, current: int, total: int) -> None:
            state.progress = LoadProgress(stage, current, total)

        def load() -> LoadedModel:
            compute_with(self.threads)
            try:
                return self._load_model(state.name, spec, tell)
            except Exception:
                raise
            except BaseException as error:  # a library in Rust panics with one that is no Exception
                raise RuntimeError(type(error).__name__) from error

        threading.Thread(
            target=run_for_future, args=(load, future), name=f"load-{state.name}", daemon=True
        ).start()
        return await future

    def idle(self) -> list[PrecisionState]:
        """Precisions that may be unloaded; never the server's default, without which it is not ready."""
        kept = self.default if self.host.pools[0] is self else None
        return [s for s in self._states.values() if s.engine and not s.users and s.name != kept]

    async def load(self, precision: str) -> AsyncGenerator[LoadProgress]:
        """Loads a precision and yields its progress; ends when it is ready.

        Raises:
            Unavailable, NotReady: as ``use``; ``NotReady`` also once the server drains.
        """
        state = self.state(precision)
        if state.engine is not None:
            return
        task = asyncio.ensure_future(self._loaded(state))
        seen: LoadProgress | None = None
        try:
            while not task.done():
                self._lifecycle.check()
                if state.progress != seen:
                    seen = state.progress
                    yield seen
                await asyncio.wait([task], timeout=0.1)
            task.result()
        finally:
            task.cancel()  # where the reader left; the load itself, shielded, continues

    async def unload(self, precision: str) -> None:
        """Stops the precision's engine, if it is loaded; running sequences end with an error."""
        state = self.state(precision)
        engine, state.engine = state.engine, None
        if engine is None:
            return
        state.state = "unloaded"
        await engine.stop()
        self._metrics.set_loaded(state.name, dict.fromkeys(memory.by_kind(engine.model), 0), 0.0)
        _log.info("%s unloaded", self.title(state))

    @property
    def first(self) -> tuple[str, ...]:
        """The precisions loaded at the start, the default first: of further models that and the shadow's."""
        first, shadow = self._settings.first_precisions(), self._settings.shadow_precision
        is_default = self.host.pools[0] is self
        return first if is_default else tuple(name for name in first if name in (self.default, shadow))

    def start(self) -> None:
        """Starts loading the start-up precisions in turn, and unloading idle ones."""
        required = self.host.pools[0] is self
        first = load_first(self, self.first, self._lifecycle if required else None)
        self._background.append(asyncio.create_task(first))
        if (seconds := self._settings.idle_unload_seconds) is not None:
            self._background.append(asyncio.create_task(unload_idle(self, seconds)))

    async def stop(self) -> None:
        """Stops the engines. A running load is left to its daemon thread."""
        for task in (*self._background, *self._loads.values()):
            task.cancel()
        for engine in self.engines:
            # after a fatal error the thread may hang: the process exits and is restarted
            await engine.stop(0.0 if self._lifecycle.fatal else _STOP_SECONDS)


def _retrieve_exception(load: "asyncio.Task[Engine]") -> None:
    """Retrieves the exception, which is already logged, so that asyncio doesn't report it again."""
    if not load.cancelled():
        load.exception()
