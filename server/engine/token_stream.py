"""The tokens of one sequence, for one reader."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from server.engine.sequence import PromptToken, SamplingParams, Sequence, Timeline, Token
from server.errors import ServiceError


class TokenStream(AsyncIterator[Token]):
    """Iterates over the tokens of one sequence as the engine generates them; for one reader.

    Closing it cancels the sequence, whose slot is free within a step.

    Args:
        cancel: the engine's.
    """

    def __init__(self, sequence: Sequence, cancel: Callable[[Sequence], None]) -> None:
        self._sequence, self._cancel = sequence, cancel
        self._events: deque[Token | ServiceError | None] = deque()
        self._arrival: asyncio.Future[None] | None = None  # the waiting reader's
        self._closed = False

    @property
    def timeline(self) -> Timeline:
        return self._sequence.timeline

    @property
    def params(self) -> SamplingParams:
        return self._sequence.params

    @property
    def preemptions(self) -> int:
        """How often the sequence was put back to wait so far."""
        return self._sequence.preemptions

    @property
    def prompt_tokens(self) -> list[PromptToken]:
        """The prompt's log-probabilities if its parameters request them; complete with the first token."""
        return self._sequence.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that a cached prefix has already; known with the first token."""
        return self._sequence.cached_tokens

    def put(self, event: Token | ServiceError | None) -> None:
        """Adds a token, an error that the reader raises, or None: the end without a token."""
        self._events.append(event)
        if (arrival := self._arrival) is not None and not arrival.done():  # done: resolved or cancelled
            arrival.set_result(None)

    async def __anext__(self) -> Token:
        if self._closed:
            raise StopAsyncIteration
        while not self._events:
            assert self._arrival is None, "one reader at a time"
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        event = self._events.popleft()
        if isinstance(event, Token):
            self._closed = event.finish is not None
            return event
        self._closed = True
        if event is None:
            raise StopAsyncIteration
        raise event

    def next_nowait(self) -> Token | None:
        """The next token if it has arrived; None if the reader has to wait, or to iterate for the end."""
        if self._closed or not self._events or not isinstance(token := self._events[0], Token):
            return None
        self._events.popleft()
        self._closed = token.finish is not None
        return token

    def close(self) -> None:
        """Cancels the sequence; has no effect once it has finished."""
        self._closed = True
        self._cancel(self._sequence)
