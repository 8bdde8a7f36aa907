"""A running request: what was asked for, and its text piece by piece."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.engine.engine import Engine
from server.engine.sequence import FinishReason, PromptToken, SamplingParams, Timeline, Token
from server.engine.token_stream import TokenStream
from server.errors import ServiceError
from server.report.choice import Choice
from server.service.precision_state import Lease
from server.service.text.codec import TextCodec
from server.settings.types import AUTO

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Conversation:
    """Messages as the model's chat template takes them: ``role``, ``content`` and what it knows besides."""

    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asked for, each value within its range."""

    prompt: str | list[int] | Conversation
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=DEFAULT_NEW_TOKENS))
    """``max_new_tokens`` and ``seed`` in it are overridden by the two below."""
    precision: str | None = None
    """Name or alias; the server's default if None."""
    fallback: bool = False
    """Serve with the default precision, saying so, where the asked one can't be had."""
    stop: tuple[str, ...] = ()
    truncate: int | None = None
    """Keep the prompt's last n tokens."""
    max_new_tokens: int | None = None
    """64, or the context left if that is less, if None."""
    length_parameter: str | None = "max_new_tokens"
    """What the client called that; None if it said nothing of the length."""
    seed: int | None = None
    """Drawn if None."""
    choice: Choice | None = None
    """Why it is that precision, where the server chose it."""


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it released; the texts joined are the generated text."""

    index: int
    """From 1."""
    token: Token
    text: str
    special: bool
    finish: FinishReason | None


class Owner(Protocol):
    """Whoever opened a continuation, and counts them."""

    codec: TextCodec

    def closed(self, continuation: "Continuation", outcome: str) -> None: ...


class Continuation:
    """A running request. Its ``chunks`` are its text; ``close`` it in a ``finally``, before any await."""

    def __init__(
        self,
        service: Owner,
        request: GenerationRequest,
        engine: Engine,
        lease: Lease,
        generation: TokenStream,
        prompt_ids: list[int],
        params: SamplingParams,
        fallback_reason: str | None,
    ) -> None:
        self._service, self._lease, self._generation = service, lease, generation
        self.precision = engine.precision
        self.precision_requested = request.precision if request.choice is None else AUTO
        self.choice = request.choice
        self.fallback_reason = fallback_reason
        self.seed = params.seed
        self.prompt_ids = prompt_ids
        self.pieces: list[Piece] = []
        self.finish_reason: FinishReason | None = None
        self._decoder = service.codec.incremental(prompt_ids, request.stop)
        self._closed = False
        self._error: ServiceError | None = None

    @property
    def timeline(self) -> Timeline:
        return self._generation.timeline

    @property
    def prompt_tokens(self) -> list[PromptToken]:
        return self._generation.prompt_tokens

    @property
    def text(self) -> str:
        """The generated text so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def mean_logprob(self) -> float:
        """Of the tokens so far; what the best of several is chosen by."""
        return sum(piece.token.logprob or 0.0 for piece in self.pieces) / max(len(self.pieces), 1)

    async def run(self) -> "Continuation":
        """To the end; for answers that come in one piece."""
        async for _ in self.chunks():
            pass
        return self

    async def chunks(self) -> AsyncGenerator[list[Piece], None]:
        """The pieces as they come, at least one a time: more where the reader is slower than the model."""
        try:
            async for token in self._generation:
                chunk = self._chunk(token)
                self.finish_reason = chunk[-1].finish
                if self.finish_reason is not None:
                    self.close()
                yield chunk
                if self.finish_reason is not None:
                    return
            self.finish_reason = "length"  # no token was asked for
        except ServiceError as error:
            self._error = error
            raise

    def _chunk(self, token: Token | None) -> list[Piece]:
        chunk: list[Piece] = []
        while token is not None:
            chunk.append(self._piece(token))
            self.pieces.append(chunk[-1])
            token = None if chunk[-1].finish is not None else self._generation.next_nowait()
        return chunk

    def _piece(self, token: Token) -> Piece:
        special = self._service.codec.is_special(token.id)
        # a token that was asked to stop at is no text, as a stop string is none
        text = "" if token.finish == "stop_sequence" else self._decoder.push(token.id)
        finish: FinishReason | None = "stop_sequence" if self._decoder.stopped else token.finish
        if finish is not None and not self._decoder.stopped:
            text += self._decoder.finish()
            finish = "stop_sequence" if self._decoder.stopped else finish
        return Piece(len(self.pieces) + 1, token, text, special, finish)

    def close(self) -> None:
        """Cancels what is still running, gives the place and the engine back. Any number of times.

        It never waits, so that no cancellation can keep it from its end.
        """
        if self._closed:
            return
        self._closed = True
        self._generation.close()
        self._lease.release()
        self._service.closed(self, self._outcome())

    async def aclose(self) -> None:
        """``close``, for ``contextlib.aclosing``."""
        self.close()

    def _outcome(self) -> str:
        if self._error is not None:
            return self._error.error_type
        return "success" if self.finish_reason is not None else "cancelled"
