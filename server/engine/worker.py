"""What the engine's thread does in one step: schedule, forward, sample, publish."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from loaders.kv_cache.block_pool import BlockPool
from loaders.runner import PagedRunner, Runner
from server.engine.executor import Executor, Output
from server.engine.fair_lock import FairLock
from server.engine.faults import as_service_error
from server.engine.sampler import PendingTokens, Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Sequence, Status, StepStats, Token
from server.errors import DeadlinePassed, NotReady, ServiceError

_WARM_UP_TOKENS = 3
_BLOCKS_PATIENCE = 30.0  # seconds for the sequences of other precisions to give blocks back

Event = tuple[Sequence, Token | ServiceError | None]
"""A sequence, and what its reader receives: a token, an error, or (None) the end without one."""


@dataclass
class Step:
    """What one step produced."""

    events: list[Event] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    decoded_rows: int = 0
    generated_tokens: int = 0
    stats: StepStats | None = None


class Worker:
    """Runs on one thread; the engine calls it there.

    Args:
        scheduler: empties the runner's slots.
        lock: held while a step computes.
        clock: seconds, as those of the sequences' deadlines; a simulation has its own.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        lock: FairLock | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner, self._scheduler, self._sampler = runner, scheduler, sampler
        self._executor = Executor(runner, sampler)
        self._lock, self._clock = lock or nullcontext(), clock
        self.busy_since: float | None = None
        """When the current step began, its wait for the lock included; None between steps."""
        self.longest_step = 0.0

    def warm_up(self) -> None:
        """One prefill and one decode: kernels are chosen and memory is allocated before the first request."""
        if isinstance(self._runner, PagedRunner):
            _wait_for_blocks(self._runner.pool)
        with self._lock:
            self._runner.prefill(0, [0, 0])
            logits = self._runner.decode([0], [0])
            if logits.is_cuda:  # each kernel is loaded onto the device at its first use
                params = SamplingParams(2, do_sample=True, top_k=2, top_p=0.5, typical_p=0.5, top_n=1)
                self._sampler.sample(logits, [Sequence([0, 0], params)])
            self._runner.free(0)

    def close(self) -> None:
        self._executor.close()

    def step(self, now: float) -> Step:
        """Advances every running sequence by a prompt chunk or a token."""
        plan = self._scheduler.schedule(now)
        step = Step([(sequence, _expiry(sequence)) for sequence in plan.expired])
        if plan.chunks or plan.rows:
            with self._timed(step):
                for output in self._executor.forward(plan):
                    tokens = self._sample(output)
                    self._publish(step, output, tokens)
                    del output  # its logits need not stay while the next pass computes
        return step

    @contextmanager
    def _timed(self, step: Step) -> Iterator[None]:
        self.busy_since = begun = self._clock()
        with self._lock:
            started = self._clock()
            yield
        ended = self._clock()
        self.busy_since = None
        self.longest_step = max(self.longest_step, ended - begun)
        step.stats = StepStats(
            step.decoded_rows, step.prompt_tokens, step.generated_tokens, ended - started, tuple(step.gaps)
        )

    def _sample(self, output: Output) -> Rows[Token | Exception | None]:
        """One token a row, its error, or None where a sequence ends with its prompt."""
        result = output.result
        if isinstance(result, Tensor):
            return self._sampler.sample(result, output.rows)
        if isinstance(result, PendingTokens):
            return result.wait()
        return [result] * len(output.rows)

    def _publish(self, step: Step, output: Output, tokens: Rows[Token | Exception | None]) -> None:
        """Appends the tokens to their sequences and to the step's events."""
        step.prompt_tokens += output.prompt_tokens
        step.decoded_rows += output.decoded_rows
        now, finished = self._clock(), Status.FINISHED
        add_event, add_gap = step.events.append, step.gaps.append
        for row, token in zip(output.rows, tokens, strict=True):
            if row.status is finished:
                continue  # it ended while this token was computed
            if not isinstance(token, Token):
                self._end(step, row, token)
                continue
            row.generated.append(token.id)
            timeline = row.timeline
            if timeline.last_token is None:
                timeline.first_token = now
            else:
                add_gap(now - timeline.last_token)
            timeline.last_token = now
            timeline.tokens += 1
            step.generated_tokens += 1
            if token.finish is not None:
                self._scheduler.finish(row)
            add_event((row, token))

    def _end(self, step: Step, sequence: Sequence, error: Exception | None) -> None:
        """Finishes a sequence by its error, or without one where only its prompt was to be computed."""
        if error is None:
            sequence.timeline.first_token = sequence.timeline.last_token = self._clock()
        self._scheduler.finish(sequence)
        step.events.append((sequence, None if error is None else as_service_error(error)))


def _wait_for_blocks(pool: BlockPool) -> None:
    """Reserves the warm-up's tokens; other precisions' sequences may hold all blocks.

    Raises:
        NotReady
    """
    until = time.perf_counter() + _BLOCKS_PATIENCE
    while not (pool.may_admit(_WARM_UP_TOKENS, [], None, 0) and pool.reserve(0, _WARM_UP_TOKENS)):
        if time.perf_counter() > until:
            raise NotReady(f"no memory of the KV caches became free within {_BLOCKS_PATIENCE:.0f} s")
        time.sleep(0.01)


def _expiry(sequence: Sequence) -> ServiceError | None:
    return None if sequence.cancelled else DeadlinePassed("the request's time was up")
