"""One replica in simulated time: the real scheduler, executor and worker on a runner that only takes time.

What decides is the server's own code: ``Scheduler``, ``Executor``, ``Worker``, ``QueueEstimate`` and
``Places``. What is simulated is the clock, the passes' seconds, and the tokens, all of which are the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loaders.runner import Logits, Runner
from server.engine.queue_estimate import QueueEstimate
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Timeline, Token
from server.engine.sequence import Sequence as Request
from server.engine.worker import Step, Worker
from server.errors import Overloaded
from server.lifecycle import Lifecycle
from server.observability.ended import Ended, SpanIds
from server.planning.step_times import Noise, StepTimes
from server.planning.workload import Frontend, Replica
from server.service.admission import Places

_TOKEN = 0


class SimulatedRunner(Runner):
    """Its passes advance ``now`` by what they take.

    Args:
        token_seconds: of every row of a pass that gets a token.
    """

    def __init__(
        self, times: StepTimes, noise: Noise, slots: int, context: int, token_seconds: float
    ) -> None:
        self.slots, self.context, self.vocabulary = slots, context, 1
        self.now = 0.0
        self._times, self._draw, self._token_seconds = times, noise.draw, token_seconds
        self._held = [0] * slots
        self._logits = torch.zeros(slots + 1, 1)

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        self._take([], slot, len(ids), 0 if logits == "none" else 1)
        return None if logits == "none" else self._logits[:1]

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self._take(slots, None, 0, len(slots))
        return self._logits[: len(slots)]

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        raise NotImplementedError("a simulated model has no logits")

    def free(self, slot: int) -> None:
        self._held[slot] = 0

    def close(self) -> None:
        """Holds nothing."""

    @property
    def kv_cache_bytes(self) -> int:
        return 0

    def _take(self, slots: Sequence[int], prompt: int | None, chunk: int, tokens: int) -> None:
        held, pairs = self._held, 0.0
        for slot in slots:
            held[slot] += 1
            pairs += held[slot]
        if prompt is not None:
            pairs += chunk * (held[prompt] + chunk / 2)
            held[prompt] += chunk
        self.now += (
            self._times.seconds(len(slots), chunk, pairs) * self._draw() + tokens * self._token_seconds
        )


class SimulatedMixedRunner(SimulatedRunner):
    """A runner that computes a prompt chunk and rows together."""

    def advance(self, slot: int, ids: Sequence[int], slots: Sequence[int], next_ids: Sequence[int]) -> Tensor:
        self._take(slots, slot, len(ids), 1 + len(slots))
        return self._logits[: 1 + len(slots)]


class SimulatedSampler(Sampler):
    """Samples the same token always; a sequence ends by its length."""

    def __init__(self) -> None:
        super().__init__(frozenset())

    def sample(self, logits: Tensor, sequences: Sequence[Request]) -> list[Token | Exception]:
        return [Token(_TOKEN, None, (), self._finish_reason(_TOKEN, one)) for one in sequences]


class _NoObserver:
    def observe_request(self, ended: Ended, span: SpanIds | None = None) -> None: ...


class SimulatedEngine:
    """Admission, queue and steps of one replica, as ``GenerationService`` and ``Engine`` do them.

    Args:
        on_token: is called with each token's sequence at the end of the step that computed it.
    """

    def __init__(
        self,
        times: StepTimes,
        noise: Noise,
        replica: Replica,
        context: int,
        frontend: Frontend,
        on_token: Callable[[Request, float], object],
    ) -> None:
        kind = SimulatedMixedRunner if times.mixed else SimulatedRunner
        self._runner = kind(times, noise, replica.slots, context, frontend.token_seconds)
        self._scheduler = Scheduler(
            replica.slots, replica.chunk, replica.busy_chunk, on_free=self._runner.free
        )
        self._worker = Worker(
            self._runner, self._scheduler, SimulatedSampler(), clock=lambda: self._runner.now
        )
        self._estimate = QueueEstimate(replica.slots, replica.busy_chunk)
        self._replica, self._on_token = replica, on_token
        self._frontend, self._taken = frontend, 0.0  # seconds of the cores since the last step
        self._inbox: list[Request] = []
        self._open: dict[Request, None] = {}
        self.places = Places(replica.places, Lifecycle(), self, _NoObserver())

    def drain_seconds(self) -> float | None:
        return self._estimate.drain_seconds(self._open)

    def reserve(self) -> bool:
        """Takes a place for a request that has arrived; False: it is refused."""
        try:
            self.places.reserve(1)
        except Overloaded:
            return False
        return True

    def open(self, prompt: int, tokens: int, now: float, arrived: float) -> Request | None:
        """Queues a request that has a place; None: it could not be finished in time, and is refused."""
        seconds = self._estimate.finish_seconds(self._open, prompt, tokens)
        deadline = arrived + self._replica.timeout
        if seconds is not None and seconds > deadline - now:
            self.places.release(1)
            return None
        request = Request(
            [_TOKEN] * prompt, SamplingParams(tokens), deadline, timeline=Timeline(arrived=arrived)
        )
        self._open[request] = None
        if self._scheduler.has_work:
            self._taken += self._frontend.request_seconds
        self._inbox.append(request)
        return request

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or self._scheduler.has_work

    @property
    def running(self) -> int:
        return self._scheduler.running

    def step(self, now: float) -> float:
        """Computes a step that begins now; returns the time of its end, when ``deliver`` is called."""
        for request in self._inbox:
            self._scheduler.add(request)
        self._inbox.clear()
        self._runner.now = now
        self._done: Step = self._worker.step(now)
        added, self._taken = self._taken, 0.0
        return self._runner.now + added + (self._frontend.step_seconds if self._done.stats else 0.0)

    def deliver(self, now: float) -> None:
        """Hands the step's tokens over, and gives back the places of sequences that have ended."""
        for request, event in self._done.events:
            ended = not isinstance(event, Token) or event.finish is not None
            if ended:
                del self._open[request]
                self.places.release(1)
                self._estimate.observe_end(request, late=not isinstance(event, Token))
            if isinstance(event, Token):
                self._on_token(request, now)
        stats = self._done.stats
        if stats is not None and (self.running >= self._replica.slots or self._scheduler.waiting):
            self._estimate.observe_step(stats)
