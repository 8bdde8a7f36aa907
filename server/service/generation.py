"""From a validated request to a running continuation, for both dialects.

``open_all`` reserves places, encodes the prompts, checks their lengths and acquires the engines.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Protocol

import loaders
from loaders.base import Checkpoint
from loaders.errors import LoaderError
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams, drawn_seed
from server.errors import (
    DeadlinePassed,
    Invalid,
    NotReady,
    Overloaded,
    ServiceError,
    Unavailable,
)
from server.observability.ended import Ended, Observer
from server.service.admission import Places
from server.service.chat.renderer import ChatRenderer
from server.service.continuation import (
    DEFAULT_NEW_TOKENS,
    Continuation,
    Conversation,
    GenerationRequest,
    operation_of,
)
from server.service.precision_state import Lease, known_precision
from server.service.text.codec import TextCodec
from server.service.text.prompt_encoder import PromptEncoder, too_long
from server.service.text_stream import Piece
from server.settings.server import Settings

__all__ = ["Continuation", "Conversation", "GenerationRequest", "GenerationService", "Piece"]


class PoolLike(Protocol):
    """The part of ``server.service.pool.Pool`` that opening a continuation needs."""

    default: str

    def use(self, precision: str) -> Lease: ...


class GenerationService:
    """Opens continuations; reserves their places before it computes anything for them.

    Args:
        places: shared by all models of the server.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        codec: TextCodec,
        pool: PoolLike,
        metrics: Observer,
        places: Places,
        chat: ChatRenderer | None,
    ) -> None:
        self.codec = codec
        self._settings, self._checkpoint = settings, checkpoint
        self._pool, self._metrics = pool, metrics
        self.places = places
        self.on_success: Callable[[Continuation], None] = lambda done: None
        """Called with every continuation that was generated to its end."""
        total = min(settings.max_total_tokens or checkpoint.context_length, checkpoint.context_length)
        self.max_total_tokens = total
        self.max_input_tokens = min(settings.max_input_tokens or total - 1, total)
        self.prompts = PromptEncoder(codec, checkpoint.vocabulary, self.max_input_tokens, total, chat)

    def is_busy(self) -> bool:
        """Whether a place is taken."""
        return self.places.in_flight > 0

    async def open_all(self, requests: Sequence[GenerationRequest], held: ExitStack) -> list[Continuation]:
        """Opens a continuation for each request.

        Args:
            held: closes the continuations that were opened, even if an error or a cancellation leaves the
                others unopened. The caller closes it in every case, before it awaits anything.

        Raises:
            ServiceError
        """
        opened: list[Continuation] = []
        try:
            self.places.reserve(len(requests))
            try:
                await self._open_each(requests, opened, held)
            finally:
                self.places.release(len(requests) - len(opened))
        except ServiceError as error:
            self._count_refused(requests[len(opened) :], error)
            raise
        return opened

    async def _open_each(
        self, requests: Sequence[GenerationRequest], opened: list[Continuation], held: ExitStack
    ) -> None:
        deadline = time.perf_counter() + self._settings.request_timeout
        encoded: dict[int, list[int]] = {}  # the requests of n and best_of have the same prompt
        for request in requests:
            if (key := id(request.prompt)) not in encoded:
                encoded[key] = await self.prompts.encode(request, deadline)
            opened.append(await self._open(request, encoded[key], deadline))
            held.callback(opened[-1].close)

    async def _open(self, request: GenerationRequest, prompt: list[int], deadline: float) -> Continuation:
        params = self.resolve(request, len(prompt))
        with ExitStack() as held:
            engine, reason = await self._find_engine(request, deadline, held)
            self._check_capacity(engine, len(prompt) + params.max_new_tokens)
            self._check_deadline(engine, deadline, len(prompt), params.max_new_tokens)
            tokens = engine.generate(prompt, params, deadline, owner=request.owner)
            held.callback(tokens.close)
            return Continuation(
                tokens,
                self.codec,
                prompt,
                request,
                precision=engine.precision,
                seed=params.seed,
                fallback_reason=reason,
                held=held,
                on_close=self._on_close,
            )

    def _on_close(self, done: Continuation) -> None:
        self.places.release(1)
        self.observe(done.as_ended())
        if done.outcome == "success":
            self.on_success(done)

    def observe(self, ended: Ended) -> None:
        """Counts a generation."""
        self._metrics.observe_request(ended)

    def _count_refused(self, requests: Sequence[GenerationRequest], error: ServiceError) -> None:
        for request in requests:
            with suppress(LoaderError):  # an unknown name is the client's text, and never a label
                precision = loaders.canonical(request.precision or self._pool.default)
                operation = operation_of(request)
                self.observe(Ended(precision=precision, outcome=error.outcome, operation=operation))

    def _check_capacity(self, engine: Engine, tokens: int) -> None:
        """Raises: PromptTooLong: the whole KV cache doesn't hold them."""
        if tokens > (capacity := engine.capacity):
            raise too_long(
                capacity, f"you requested {tokens} tokens; KV_CACHE_MEMORY holds no more", "inputs"
            )

    def _check_deadline(self, engine: Engine, deadline: float, prompt_tokens: int, new_tokens: int) -> None:
        """Refuses what can't be finished before its deadline, so that it neither waits nor computes in vain.

        Raises:
            Overloaded
        """
        left = deadline - time.perf_counter()
        seconds = engine.finish_seconds(prompt_tokens, new_tokens)
        if seconds is not None and seconds > left:
            limit = self._settings.request_timeout
            raise Overloaded(
                f"so much is waiting that this would not be finished within {limit:g} s",
                retry_spread=self.places.retry_spread(),
            )

    def resolve(self, request: GenerationRequest, prompt: int) -> SamplingParams:
        """The sampling parameters, with length and seed set, for a prompt of ``prompt`` tokens.

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
        """The end tokens, which are not sampled before ``min_new_tokens`` of the ``count`` tokens."""
        if params.min_new_tokens > count:
            raise Invalid(f"min_tokens: at most the {count} tokens of the answer", param="min_tokens")
        if not params.min_new_tokens:
            return ()
        ends = params.stop_ids | (frozenset() if params.ignore_eos else self._checkpoint.eos_ids)
        if len(ends) >= self._checkpoint.vocabulary:
            raise Invalid("min_tokens: stop_token_ids leave no token", param="stop_token_ids")
        return tuple(sorted(ends))

    async def _find_engine(
        self, request: GenerationRequest, deadline: float, held: ExitStack
    ) -> tuple[Engine, str | None]:
        """The engine, which ``held`` releases, and the reason if it is the fallback's."""
        name = known_precision(request.precision or self._pool.default)
        try:
            return await self._acquire(name, deadline, held), None
        except (Unavailable, NotReady) as error:
            if not request.fallback or name == self._pool.default:
                raise
            reason = error.message
        return await self._acquire(self._pool.default, deadline, held), reason

    async def _acquire(self, precision: str, deadline: float, held: ExitStack) -> Engine:
        lease = self._pool.use(precision)
        held.callback(lease.release)
        try:
            async with asyncio.timeout(deadline - time.perf_counter()):
                return await lease.acquire()
        except TimeoutError:
            raise DeadlinePassed(f"{precision} was not loaded in time") from None
