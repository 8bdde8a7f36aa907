"""Tokens become text: the pieces of one sequence's text, as its tokens are generated."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Self

from server.engine.sequence import FinishReason, PromptToken, Timeline, Token
from server.engine.token_stream import TokenStream
from server.errors import ServiceError
from server.observability.ended import Ended
from server.service.text.codec import TextCodec


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it released; the texts joined are the generated text."""

    index: int
    """From 1."""
    token: Token
    text: str
    special: bool
    finish: FinishReason | None


class TextStream:
    """The text of one sequence as it is generated, for one reader. ``close`` it in a ``finally``.

    Args:
        tokens: what the engine generates.
        codec: the checkpoint's tokenizer.
        prompt_ids: the tokens that the text continues; the first generated token's text depends on them.
        stop: strings that end the text and are no part of it.

    Raises:
        GenerationFailed: the tokenizer fails to decode the prompt.
    """

    def __init__(
        self, tokens: TokenStream, codec: TextCodec, prompt_ids: list[int], stop: Sequence[str] = ()
    ) -> None:
        self.prompt_ids = prompt_ids
        self.pieces: list[Piece] = []
        self.finish_reason: FinishReason | None = None
        self._tokens, self._codec = tokens, codec
        self._decoder = codec.incremental(prompt_ids, stop)
        self._error: ServiceError | None = None

    @property
    def timeline(self) -> Timeline:
        return self._tokens.timeline

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that a cached prefix had already."""
        return self._tokens.cached_tokens

    @property
    def prompt_tokens(self) -> list[PromptToken]:
        return self._tokens.prompt_tokens

    @property
    def text(self) -> str:
        """The generated text so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens so far; ``best_of`` ranks by it."""
        return sum(piece.token.logprob or 0.0 for piece in self.pieces) / max(len(self.pieces), 1)

    @property
    def outcome(self) -> str:
        """``success``, an error's outcome, or ``cancelled`` before the text has ended."""
        if self._error is not None:
            return self._error.outcome
        return "success" if self.finish_reason is not None else "cancelled"

    def ended(self, precision: str) -> Ended:
        """What metrics and traces take of it; to be called once it has ended."""
        return Ended(
            precision=precision,
            outcome=self.outcome,
            timeline=self.timeline,
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.cached_tokens,
            preemptions=self._tokens.preemptions,
            finish=self.finish_reason,
            params=self._tokens.params,
        )

    async def run(self) -> Self:
        """Generates the whole text; for answers that are sent at once.

        Raises:
            ServiceError
        """
        async for _ in self.chunks():
            pass
        return self

    async def chunks(self) -> AsyncGenerator[list[Piece], None]:
        """Yields at least one piece at a time, and all that are ready where the reader is slower than the
        model. The stream is closed before its last chunk is yielded.

        Raises:
            ServiceError: after every piece that was generated before it.
        """
        try:
            async for token in self._tokens:
                chunk = self._chunk(token)
                self.finish_reason = chunk[-1].finish
                if self.finish_reason is not None:
                    self.close()
                yield chunk
                if self.finish_reason is not None:
                    return
            self.finish_reason = "length"  # of a sequence without generated tokens
        except ServiceError as error:
            self._error = error
            raise

    def _chunk(self, token: Token | None) -> list[Piece]:
        chunk: list[Piece] = []
        while token is not None:
            chunk.append(self._piece(token))
            self.pieces.append(chunk[-1])
            token = None if chunk[-1].finish is not None else self._tokens.next_nowait()
        return chunk

    def _piece(self, token: Token) -> Piece:
        special = self._codec.is_special(token.id)
        # a stop token is no part of the text, as a stop string is none
        text = "" if token.finish == "stop_sequence" else self._decoder.push(token.id)
        finish: FinishReason | None = "stop_sequence" if self._decoder.stopped else token.finish
        if finish is not None and not self._decoder.stopped:
            text += self._decoder.finish()
            finish = "stop_sequence" if self._decoder.stopped else finish
        return Piece(len(self.pieces) + 1, token, text, special, finish)

    def close(self) -> None:
        """Cancels what has not been generated yet. It never awaits; any number of calls."""
        self._tokens.close()
