"""A request from validated parameters to a continuation: what both dialects share.

Lengths are checked, a place is taken, the prompt encoded, the engine found; then text comes piece by piece.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Protocol

import loaders
from loaders.base import Checkpoint, LoaderError
from server.continuation import DEFAULT_NEW_TOKENS, Continuation, Conversation, GenerationRequest, Piece
from server.engine import Engine
from server.errors import (
    BadPrecision,
    DeadlinePassed,
    Invalid,
    NotReady,
    Overloaded,
    PromptTooLong,
    ServiceError,
    Unavailable,
)
from server.lifecycle import Lifecycle
from server.promised_places import PromisedPlaces, release_held
from server.sequence import SamplingParams, Timeline
from server.settings import Settings
from server.text import TextCodec

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Continuation",
    "Conversation",
    "GenerationRequest",
    "MetricsLike",
    "Piece",
    "Service",
]
_DRAIN_AGE = 0.25  # seconds for which the estimate that clients are sent away with is kept
_LONG = 4000  # characters, which take a millisecond or two to encode: longer ones don't keep the event loop


class PoolLike(Protocol):
    """What is needed of ``server.pool.Pool``."""

    default: str

    def use(self, precision: str) -> AbstractAsyncContextManager[Engine]: ...

    def drain_seconds(self) -> float | None: ...


class MetricsLike(Protocol):
    """What is needed of ``server.metrics.Metrics``."""

    def observe_request(
        self, precision: str, outcome: str, timeline: Timeline, prompt_tokens: int
    ) -> None: ...


class Service:
    """Opens continuations. Places are counted here, before anything is computed for a request."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        codec: TextCodec,
        pool: PoolLike,
        metrics: MetricsLike,
        lifecycle: Lifecycle,
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

    async def open(self, request: GenerationRequest) -> Continuation:
        """Raises a ``ServiceError`` and holds nothing, or returns what must be closed."""
        return (await self.open_all([request]))[0]

    async def open_all(self, requests: Sequence[GenerationRequest]) -> list[Continuation]:
        """All of them or, with an error, none."""
        opened: list[Continuation] = []
        places = 0
        try:
            places = self._reserve(len(requests))
            deadline = time.perf_counter() + self._settings.request_timeout
            for request in requests:
                opened.append(await self._open(request, deadline))
        except BaseException as error:
            self.in_flight -= places - len(opened)
            if isinstance(error, ServiceError):
                self._count(requests[len(opened) :], error)
            for continuation in opened:
                await continuation.aclose()
            raise
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

    def check(self, places: int) -> None:
        """Whether so many would be given now.

        Raises:
            NotReady, Overloaded
        """
        self._lifecycle.check()
        if self.in_flight + self.promised.count + places > self._settings.max_concurrent_requests:
            message = f"all {self._settings.max_concurrent_requests} places are taken"
            raise Overloaded(message, retry_spread=self._retry_spread())

    def _retry_spread(self) -> float:
        """Seconds within which refused clients should come back: twice as long as the queue is now, so that
        on average they come when it is served, and some sooner, for places become free all the time."""
        now = time.perf_counter()
        if now - self._drain_measured > _DRAIN_AGE:
            self._drain, self._drain_measured = self._pool.drain_seconds() or 0.0, now
        return max(2 * self._drain, Overloaded.retry_spread)

    def _reserve(self, places: int) -> int:
        release_held()
        self.check(places)
        self.in_flight += places
        self.on_arrival()
        return places

    async def _open(self, request: GenerationRequest, deadline: float) -> Continuation:
        prompt = await self.encode(request)
        params = self.resolve(request, len(prompt))
        lease, engine, reason = await self._find_engine(request, deadline)
        try:
            self._check_deadline(engine, deadline, len(prompt), params.max_new_tokens)
            generation = engine.generate(prompt, params, deadline)
        except BaseException:
            await lease.__aexit__(None, None, None)
            raise
        return Continuation(self, request, engine, lease, generation, prompt, params, reason)

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

    async def encode(self, request: GenerationRequest) -> list[int]:
        """The prompt's ids, all of them in the vocabulary; at least one.

        Raises:
            Invalid
        """
        if (request.truncate or 0) > self.max_total_tokens:
            raise Invalid(f"truncate: at most {self.max_total_tokens} tokens", param="truncate")
        ids = await self._ids(request.prompt)
        if not ids:
            raise Invalid("the input has no tokens", param="inputs")
        if min(ids) < 0 or max(ids) >= self._checkpoint.vocabulary:
            raise Invalid(f"token ids go from 0 to {self._checkpoint.vocabulary - 1}", param="inputs")
        return ids[-request.truncate :] if request.truncate else ids

    async def _ids(self, prompt: str | list[int] | Conversation) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, Conversation):
            try:
                return await asyncio.to_thread(self.codec.encode_chat, prompt.messages)
            except Exception:  # a template is a program of the model's author, and refuses in its own ways
                raise Invalid("the model's chat template refuses these messages", param="inputs") from None
        if len(prompt) > _LONG:
            return await asyncio.to_thread(self.codec.encode, prompt)
        return self.codec.encode(prompt)

    def resolve(self, request: GenerationRequest, prompt: int) -> SamplingParams:
        """The parameters with length and seed settled, for a prompt of so many tokens.

        Raises:
            PromptTooLong
        """
        limit = self.max_total_tokens
        wanted = request.max_new_tokens
        needed = prompt + (1 if wanted is None else wanted)
        if prompt > self.max_input_tokens and not (wanted == 0 and prompt <= limit):
            raise PromptTooLong(
                f"the prompt has {prompt} tokens; at most {self.max_input_tokens} are accepted",
                param="inputs",
            )
        if needed > limit:
            raise PromptTooLong(
                f"{prompt} prompt tokens and max_new_tokens {wanted or 1} exceed the context of {limit}",
                param="max_new_tokens",
            )
        count = min(DEFAULT_NEW_TOKENS, limit - prompt) if wanted is None else wanted
        seed = secrets.randbits(64) if request.seed is None else request.seed
        return replace(request.params, max_new_tokens=count, seed=seed)

    async def _find_engine(
        self, request: GenerationRequest, deadline: float
    ) -> tuple[AbstractAsyncContextManager[Engine], Engine, str | None]:
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

    async def _lease(
        self, precision: str, deadline: float
    ) -> tuple[AbstractAsyncContextManager[Engine], Engine]:
        lease = self._pool.use(precision)
        try:
            async with asyncio.timeout(deadline - time.perf_counter()):
                return lease, await lease.__aenter__()
        except TimeoutError:
            raise DeadlinePassed(f"{precision} was not loaded in time") from None
