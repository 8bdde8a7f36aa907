"""A request from validated parameters to a continuation: what both dialects share.

Lengths are checked, a place is taken, the prompt encoded, the engine found; then text comes piece by piece.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Protocol

import loaders
from loaders.base import Checkpoint
from loaders.errors import LoaderError
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams, Timeline, drawn_seed
from server.errors import (
    BadPrecision,
    DeadlinePassed,
    Invalid,
    NotReady,
    Overloaded,
    ServiceError,
    Unavailable,
)
from server.http.admission.promised_places import PromisedPlaces, release_held
from server.lifecycle import Lifecycle
from server.observability.observer import Observer
from server.service.chat.renderer import ChatRenderer
from server.service.continuation import (
    DEFAULT_NEW_TOKENS,
    Continuation,
    Conversation,
    GenerationRequest,
    Piece,
)
from server.service.precision_state import Lease
from server.service.text.codec import TextCodec
from server.service.text.prompt_encoder import PromptEncoder, too_long
from server.settings.server import Settings

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Continuation",
    "Conversation",
    "GenerationRequest",
    "GenerationService",
    "Observer",
    "Piece",
]
UNREAD = "unread"
"""What metrics call the precision of a request that was refused before it was read."""
_DRAIN_AGE = 0.25  # seconds for which the estimate that clients are sent away with is kept


class PoolLike(Protocol):
    """What is needed of ``server.service.pool.Pool``."""

    default: str

    def use(self, precision: str) -> Lease: ...

    def drain_seconds(self) -> float | None: ...


class GenerationService:
    """Opens continuations. Places are counted here, before anything is computed for a request."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        codec: TextCodec,
        pool: PoolLike,
        metrics: Observer,
        lifecycle: Lifecycle,
        chat: ChatRenderer | None = None,
    ) -> None:
        self.codec = codec
        self._settings, self._checkpoint = settings, checkpoint
        self._pool, self._metrics, self._lifecycle = pool, metrics, lifecycle
        self.on_arrival: Callable[[], None] = lambda: None
        self.on_success: Callable[[Continuation], None] = lambda done: None
        """Told of every request that was served to its end."""
        self.in_flight = 0
        """Places taken: continuations open or opening, and what else holds one."""
        self.promised = PromisedPlaces()
        self._drain, self._drain_measured = 0.0, -math.inf
        total = min(settings.max_total_tokens or checkpoint.context_length, checkpoint.context_length)
        self.max_total_tokens = total
        self.max_input_tokens = min(settings.max_input_tokens or total - 1, total)
        self.prompts = PromptEncoder(codec, checkpoint.vocabulary, self.max_input_tokens, total, chat)

    async def open(self, request: GenerationRequest) -> Continuation:
        """Raises a ``ServiceError`` and holds nothing, or returns what must be closed."""
        with ExitStack() as held:
            (opened,) = await self.open_all([request], held)
            held.pop_all()
        return opened

    async def open_all(self, requests: Sequence[GenerationRequest], held: ExitStack) -> list[Continuation]:
        """Opens them all.

        Args:
            held: of the caller, who closes it in any case, without having awaited anything before. It closes
                what was opened, also where an error or a cancellation lets some of them be opened only.

        Raises:
            ServiceError
        """
        opened: list[Continuation] = []
        encoded: dict[int, list[int]] = {}  # n and best_of have the same prompt several times
        places = 0
        try:
            places = self._reserve(len(requests))
            deadline = time.perf_counter() + self._settings.request_timeout
            for request in requests:
                if (key := id(request.prompt)) not in encoded:
                    encoded[key] = await self.prompts.encode(request, deadline)
                opened.append(await self._open(request, encoded[key], deadline))
                held.callback(opened[-1].close)
        except ServiceError as error:
            self._count(requests[len(opened) :], error)
            raise
        finally:
            self.in_flight -= places - len(opened)
        return opened

    def _count(self, refused: Sequence[GenerationRequest], error: ServiceError) -> None:
        for request in refused:
            with suppress(LoaderError):  # a label must not be the client's own words
                precision = loaders.canonical(request.precision or self._pool.default)
                self._metrics.observe_request(precision, error.error_type, Timeline(), 0)

    def closed(self, continuation: Continuation, outcome: str) -> None:
        self.in_flight -= 1
        prompt = len(continuation.prompt_ids)
        self.observe(continuation.precision, outcome, continuation.timeline, prompt)
        if outcome == "success":
            self.on_success(continuation)

    def observe(self, precision: str, outcome: str, timeline: Timeline, prompt_tokens: int) -> None:
        """Counts a generation that has ended."""
        self._metrics.observe_request(precision, outcome, timeline, prompt_tokens)

    def observe_unread(self, error: ServiceError) -> None:
        """Counts a generation that was refused before its request was read."""
        self.observe(UNREAD, error.error_type, Timeline(), 0)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place for work that opens no continuation.

        Raises:
            NotReady, Overloaded
        """
        self._reserve(1)
        try:
            yield
        finally:
            self.in_flight -= 1

    def hold_place(self) -> Callable[[], None]:
        """Takes a place, whether one is free or not, for a computed answer; returns what gives it back."""
        held = ExitStack()
        self.in_flight += 1
        held.callback(self._give_back)
        return held.close

    def _give_back(self) -> None:
        self.in_flight -= 1

    def refusal(self, places: int) -> ServiceError | None:
        """Why so many would not be given now: ``NotReady`` or ``Overloaded``."""
        if (not_ready := self._lifecycle.refusal()) is not None:
            return not_ready
        limit = self._settings.max_concurrent_requests
        if self.in_flight + self.promised.count + places <= limit:
            return None
        return Overloaded(f"all {limit} places are taken", retry_spread=self._retry_spread())

    def _retry_spread(self) -> float:
        """Seconds within which refused clients should come back: twice as long as the queue is now, so that
        on average they come when it is served, and some sooner, for places become free all the time."""
        now = time.perf_counter()
        if now - self._drain_measured > _DRAIN_AGE:
            self._drain, self._drain_measured = self._pool.drain_seconds() or 0.0, now
        return max(2 * self._drain, Overloaded.retry_spread)

    def _reserve(self, places: int) -> int:
        release_held()
        if (error := self.refusal(places)) is not None:
            raise error
        self.in_flight += places
        self.on_arrival()
        return places

    async def _open(self, request: GenerationRequest, prompt: list[int], deadline: float) -> Continuation:
        params = self.resolve(request, len(prompt))
        lease, engine, reason = await self._find_engine(request, deadline)
        with ExitStack() as held:
            held.callback(lease.release)
            self._check_deadline(engine, deadline, len(prompt), params.max_new_tokens)
            generation = engine.generate(prompt, params, deadline)
            held.callback(generation.close)
            opened = Continuation(self, request, engine, lease, generation, prompt, params, reason)
            held.pop_all()
        return opened

    def _check_deadline(self, engine: Engine, deadline: float, prompt_tokens: int, new_tokens: int) -> None:
        """Refuses now what would be computed, or wait, for nothing."""
        left = deadline - time.perf_counter()
        seconds = engine.finish_seconds(prompt_tokens, new_tokens)
        if seconds is not None and seconds > left:
            limit = self._settings.request_timeout
            raise Overloaded(
                f"so much is waiting that this would not be finished within {limit:g} s",
                retry_spread=self._retry_spread(),
            )

    def resolve(self, request: GenerationRequest, prompt: int) -> SamplingParams:
        """The parameters with length and seed settled, for a prompt of so many tokens.

        Raises:
            PromptTooLong, Invalid
        """
        limit, wanted = self.max_total_tokens, request.max_new_tokens
        read = "messages" if isinstance(request.prompt, Conversation) else "prompt"
        if prompt > self.max_input_tokens and not (wanted == 0 and prompt <= limit):
            raise too_long(
                limit,
                f"your {read} resulted in {prompt} tokens, of which {self.max_input_tokens} are accepted",
                "inputs",
            )
        needed = prompt + (1 if wanted is None else wanted)
        if needed > limit:
            name = request.length_parameter
            raise too_long(
                limit,
                f"you requested {needed} tokens ({prompt} in the {read}, {needed - prompt} "
                f"{f'by {name}' if name else 'in the completion'})",
                name or "inputs",
            )
        count = min(DEFAULT_NEW_TOKENS, limit - prompt) if wanted is None else wanted
        seed = drawn_seed() if request.seed is None else request.seed
        return replace(
            request.params, max_new_tokens=count, seed=seed, withheld=self._withheld(request.params, count)
        )

    def _withheld(self, params: SamplingParams, count: int) -> tuple[int, ...]:
        """Tokens that would end a sequence of ``count`` tokens before the fewest that were asked for."""
        if params.min_new_tokens > count:
            raise Invalid(f"min_tokens: at most the {count} tokens of the answer", param="min_tokens")
        if not params.min_new_tokens:
            return ()
        ends = params.stop_ids | (frozenset() if params.ignore_eos else self._checkpoint.eos_ids)
        if len(ends) >= self._checkpoint.vocabulary:
            raise Invalid("min_tokens: stop_token_ids leave no token", param="stop_token_ids")
        return tuple(sorted(ends))

    async def _find_engine(
        self, request: GenerationRequest, deadline: float
    ) -> tuple[Lease, Engine, str | None]:
        name = request.precision or self._pool.default
        try:
            name = loaders.canonical(name)
        except LoaderError as error:
            raise BadPrecision(str(error)) from None
        try:
            return *await self._lease(name, deadline), None
        except (Unavailable, NotReady) as error:
            if not request.fallback or name == self._pool.default:
                raise
            reason = error.message
        return *await self._lease(self._pool.default, deadline), reason

    async def _lease(self, precision: str, deadline: float) -> tuple[Lease, Engine]:
        lease = self._pool.use(precision)
        try:
            async with asyncio.timeout(deadline - time.perf_counter()):
                return lease, await lease.__aenter__()
        except TimeoutError:
            raise DeadlinePassed(f"{precision} was not loaded in time") from None
