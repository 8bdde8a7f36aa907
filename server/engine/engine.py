"""One loaded model: a worker thread that owns scheduler, runner and cache, and its link to the event loop.

The event loop sends new and cancelled sequences through an inbox; the thread sends tokens by one
``call_soon_threadsafe`` per step. Only the thread uses sequences, slots and tensors, so there are no locks.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from loaders.base import LoadedModel
from loaders.runner import PagedRunner
from server.concurrency import resolve_future
from server.engine.fair_lock import FairLock
from server.engine.inbox import Inbox
from server.engine.paged_slots import PagedSlots
from server.engine.queue_estimate import QueueEstimate
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Sequence, StepStats, Token
from server.engine.token_stream import TokenStream
from server.engine.worker import Step, Worker
from server.errors import DeadlinePassed, GenerationFailed, NotReady, ServiceError, Unloaded
from server.host.threads import compute_with, resolve

_SLOWEST_GRACE = 2.0  # seconds for any step before the engine is reported as stalled


class Engine:
    """Continuous batching over one ``LoadedModel``. Created and called on the event loop.

    Args:
        threads: CPU threads of a step; chosen by ``server.host.threads`` if None.
        on_step: is called on the event loop with the figures of each step.
        on_death: is called on the event loop with the reason when the worker thread fails.
        lock: held while a step computes.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        eos_ids: frozenset[int],
        prefill_chunk: int = 128,
        prefill_chunk_busy: int | None = None,
        threads: int | None = None,
        on_step: Callable[[StepStats], None] | None = None,
        on_death: Callable[[str], None] | None = None,
        lock: FairLock | None = None,
    ) -> None:
        self.model, self.precision = model, model.precision
        self.last_used = time.perf_counter()
        self._on_step, self._on_death = on_step, on_death
        self._threads = resolve(threads)
        self._scheduler = Scheduler(
            model.runner.slots,
            prefill_chunk,
            prefill_chunk_busy,
            on_free=model.runner.free,
            paging=PagedSlots.of(model.runner),
        )
        self._estimate = QueueEstimate(
            model.runner.slots, min(prefill_chunk, prefill_chunk_busy or prefill_chunk)
        )
        self._worker = Worker(model.runner, self._scheduler, Sampler(eos_ids), lock)
        self._pool = model.runner.pool if isinstance(model.runner, PagedRunner) else None
        self._inbox = Inbox()
        self._streams: dict[Sequence, TokenStream] = {}
        self._ended: str | None = None  # why no more sequences are accepted
        self._thread: threading.Thread | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Starts the worker thread and waits for its warm-up.

        Raises:
            Exception: the warm-up failed.
        """
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=f"engine-{self.precision}", daemon=True
        )
        self._thread.start()
        await ready

    def generate(
        self,
        ids: list[int],
        params: SamplingParams,
        deadline: float | None = None,
        observe: Callable[[Tensor], None] | None = None,
        chunk: int | None = None,
        owner: str | None = None,
    ) -> TokenStream:
        """Queues a sequence and returns the stream of its tokens.

        Args:
            ids: the prompt; it and ``max_new_tokens`` together fit the context.
            deadline: ``time.perf_counter()`` seconds after which it expires, waiting or running.
            observe: is called with the prompt's logits on the worker's thread (see ``Sequence.observe``).
            chunk: most prompt tokens computed in a step (see ``Sequence.chunk``).
            owner: whose prompts share their cached prefixes (see ``Sequence.owner``).

        Raises:
            NotReady: the worker has failed or is stopping.
        """
        if self._ended is not None:
            raise NotReady(f"{self.precision} is not running: {self._ended}")
        sequence = Sequence(list(ids), params, deadline, observe=observe, chunk=chunk, owner=owner)
        stream = self._streams[sequence] = TokenStream(sequence, self.cancel)
        self.last_used = time.perf_counter()
        self._inbox.add(sequence)
        return stream

    def cancel(self, sequence: Sequence) -> None:
        if sequence in self._streams:
            self._inbox.cancel(sequence)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return min(self._scheduler.running, len(self._streams))

    @property
    def waiting(self) -> int:
        return len(self._streams) - self.running

    @property
    def preemptions(self) -> int:
        """Sequences that had to give their blocks back before their end, counted each time."""
        return self._scheduler.preemptions

    @property
    def capacity(self) -> int:
        """Most tokens of one sequence."""
        context = self.model.runner.context
        return context if self._pool is None else min(context, self._pool.capacity)

    def drain_seconds(self) -> float | None:
        """Until every running and waiting sequence has finished; None before that can be estimated."""
        return self._estimate.drain_seconds(self._streams)

    def finish_seconds(self, prompt_tokens: int, new_tokens: int) -> float | None:
        """Until a sequence queued now would have finished; None if a slot is free or nothing was measured."""
        return self._estimate.finish_seconds(self._streams, prompt_tokens, new_tokens)

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the current step began; 0 between steps."""
        since = self._worker.busy_since
        return 0.0 if since is None else time.perf_counter() - since

    def health(self) -> str | None:
        """Why the engine is unhealthy, or None: its worker failed, or a step far exceeds all before it."""
        if self._ended is not None:
            return self._ended
        allowed = max(_SLOWEST_GRACE, 5 * self._worker.longest_step)
        if (stalled := self.stalled_seconds) > allowed:
            return f"no progress for {stalled:.0f} s"
        return None

    def fail(self, reason: str) -> None:
        """Ends every sequence with an error; ``generate`` raises from now on."""
        self._end(reason, GenerationFailed(f"the {self.precision} worker failed: {reason}"))

    def _end(self, reason: str, error: GenerationFailed) -> None:
        if self._ended is None:
            self._ended = reason
            for stream in self._streams.values():
                stream.put(error)
            self._streams.clear()
            self._inbox.stop()

    async def stop(self, patience: float = 5.0) -> None:
        """Ends every sequence with an error and waits up to ``patience`` seconds for the thread to end."""
        self._end("it is being unloaded", Unloaded(f"{self.precision} was unloaded; ask again to load it"))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, patience)

    # the worker thread

    def _run(self, ready: "asyncio.Future[None]") -> None:
        compute_with(self._threads)
        try:
            self._worker.warm_up()
        except BaseException as error:
            failure = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
            self._call_soon(partial(resolve_future, ready, None, failure))
            with contextlib.suppress(Exception):
                self._worker.close()
            return
        self._call_soon(partial(resolve_future, ready))
        try:
            step = Step()
            while self._inbox.receive(self._scheduler, blocked=step.stats is None):
                step = self._worker.step(time.perf_counter())
                if step.events or step.stats is not None:
                    self._call_soon(partial(self._deliver, step))
            self._worker.close()
        except BaseException as error:  # SystemExit as well: the streams must end whatever stops the worker
            reason = f"{type(error).__name__} in the worker thread"
            self._call_soon(partial(self._died, reason))

    def _call_soon(self, callback: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback)

    # back on the event loop

    def _deliver(self, step: Step) -> None:
        for sequence, item in step.events:
            stream = self._streams.get(sequence)
            if stream is None:
                continue
            stream.put(item)
            if not isinstance(item, Token) or item.finish is not None:
                del self._streams[sequence]
                if not isinstance(item, ServiceError) or isinstance(item, DeadlinePassed):
                    self._estimate.observe_end(sequence, late=isinstance(item, DeadlinePassed))
        if step.events:
            self.last_used = time.perf_counter()
        if step.stats is not None:
            if self.running >= self.model.runner.slots or self._scheduler.waiting:
                self._estimate.observe_step(step.stats)
            if self._on_step is not None:
                self._on_step(step.stats)

    def _died(self, reason: str) -> None:
        if self._ended is None:
            self.fail(reason)
            if self._on_death is not None:
                self._on_death(f"{self.precision}: {reason}")
