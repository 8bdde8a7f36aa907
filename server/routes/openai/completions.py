"""``POST /v1/completions``: prompts, choices and streams."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.engine.sequence import drawn_seed
from server.errors import Invalid
from server.http.streaming import event
from server.routes.generation_request import make_request
from server.routes.openai.format import CompletionLogprobs, finish, joined, running_usage, usage
from server.routes.openai.merge import merged
from server.routes.openai.schemas import CompletionBody
from server.routes.precision_choice import PrecisionChoice, model_of
from server.routes.shared import SEEDS, headers, run_all, served, stream_all, timings, whole
from server.service.generation import Continuation, GenerationRequest, Piece
from server.settings.server import Settings

_DEFAULT_TOKENS = 16
Prompt = str | list[int]


def prompts_of(value: Any, settings: Settings) -> list[Prompt]:
    """The prompts of a request: a string, strings, token ids, or lists of token ids.

    Raises:
        Invalid
    """
    if _is_text(value):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value[:1]):
            if _are_ids(value):
                return [value]
        elif len(value) > settings.max_concurrent_requests:
            raise Invalid(f"at most {settings.max_concurrent_requests} prompts", param="prompt")
        elif all(_is_prompt(prompt) for prompt in value) and len({type(prompt) for prompt in value}) == 1:
            return value
    raise Invalid("prompt must be a string, strings, token ids or lists of token ids", param="prompt")


def _is_prompt(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value) and _are_ids(value))


def _is_text(value: Any) -> bool:
    """Whether ``value`` is a string without lone surrogates, which no tokenizer accepts."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_ids(value: list[Any]) -> bool:
    return all(type(id_) is int for id_ in value)


@dataclass
class Completion:
    """One completion request, from its validated body to its response."""

    request: Request
    body: CompletionBody
    requested: PrecisionChoice
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        model = model_of(self.request)
        self.codec = model.codec
        self.settings = model.settings
        self.model: str = self.body.model or model.name
        self.prompts = prompts_of(self.body.prompt, model.settings)
        self.n = self.body.n or 1
        self.each = max(self.body.best_of or 1, self.n)
        """Continuations computed for each prompt, of which n are returned."""
        if len(self.prompts) * self.each > self.settings.max_concurrent_requests:
            most = self.settings.max_concurrent_requests
            raise Invalid(f"prompts and n together ask for more than {most} continuations", param="prompt")

    async def answer(self) -> Response:
        return await (self._stream() if self.body.stream else self._whole())

    def _requests(self) -> list[GenerationRequest]:
        chosen = self.body.chosen_seed
        first = drawn_seed() if chosen is None else chosen
        most = _DEFAULT_TOKENS if self.body.max_tokens is None else self.body.max_tokens
        sampling = self.body.parameters(most)
        return [
            make_request(
                prompt or self._beginning(),
                sampling,
                requested=self.requested,
                fallback=self.body.fallback,
                seed=(first + i) % SEEDS,
                logprobs=self.body.logprobs is not None or self.each > self.n,
                top_n=self.body.logprobs or 0,
                prompt_logprobs=bool(self.body.echo) and self.body.logprobs is not None,
                more=self.body,
            )
            for prompt in self.prompts
            for i in range(self.each)
        ]

    def _beginning(self) -> Prompt:
        """The prompt that stands in for an empty text: the token with which the model's documents begin."""
        return "" if self.codec.encode("") else self.codec.beginning

    async def _whole(self) -> Response:
        done = await run_all(self.request, self._requests(), self.id)
        returned = [
            best
            for at in range(0, len(done), self.each)
            for best in sorted(done[at : at + self.each], key=attrgetter("mean_logprob"), reverse=True)[
                : self.n
            ]
        ]
        choices = []
        for i, one in enumerate(returned):
            choices.append(self._choice(i, one))
            await asyncio.sleep(0)  # a hundred with log-probabilities would block the loop for half a second
        reply = self._frame(choices, done[0])
        reply["usage"] = usage(done[:: self.each], done)
        return whole(self.request, reply, headers(done[0]))

    def _frame(self, choices: list[dict[str, Any]], one: Continuation) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **served(one),
        }

    def _choice(self, index: int, done: Continuation) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            builder = self._logprobs(index, done)
            prompt = builder.of_prompt(done.prompt_tokens if self.body.echo else [])
            logprobs = joined(prompt, builder.of_pieces(done.pieces))
        return _choice(index, self._echo(index, done) + done.text, logprobs, finish(done.finish_reason))

    def _logprobs(self, index: int, one: Continuation) -> CompletionLogprobs:
        characters = len(self._prompt_text(index, one))
        return CompletionLogprobs(self.codec, self.body.logprobs or 0, one.prompt_ids, characters)

    def _prompt_text(self, index: int, one: Continuation) -> str:
        prompt = self.prompts[index // self.n]
        if isinstance(prompt, str) and not self.body.truncate_prompt_tokens:
            return prompt
        return self.codec.decode(one.prompt_ids)

    def _echo(self, index: int, one: Continuation) -> str:
        return self._prompt_text(index, one) if self.body.echo else ""

    async def _stream(self) -> Response:
        return await stream_all(self.request, self._requests(), self._events, self.id)

    async def _events(self, opened: list[Continuation]) -> AsyncGenerator[bytes]:
        with_logprobs = self.body.logprobs is not None
        builders = [self._logprobs(index, one) if with_logprobs else None for index, one in enumerate(opened)]
        begun: set[int] = set()
        async with aclosing(merged(opened)) as items:
            async for index, pieces in items:
                chunks: list[bytes] = []
                for piece in pieces or (None,):
                    first = index not in begun
                    choice = self._delta(index, piece, opened[index], builders[index], first)
                    begun.add(index)
                    figures = self._figures(opened[index], piece, choice["finish_reason"])
                    chunks.append(event({**self._frame([choice], opened[index]), **figures}))
                yield b"".join(chunks)
        if self.body.includes_usage:
            yield event({**self._frame([], opened[0]), "usage": usage(opened[:: self.each], opened)})
        yield event("[DONE]")

    def _figures(self, one: Continuation, piece: Piece | None, reason: str | None) -> dict[str, Any]:
        """The usage so far, if every chunk includes it, and a choice's times in its last chunk."""
        figures: dict[str, Any] = {"timings": timings(one)} if reason else {}
        if self.body.continuous_usage:
            figures["usage"] = running_usage(one, piece.index if piece else 0)
        return figures

    def _delta(
        self,
        index: int,
        piece: Piece | None,
        one: Continuation,
        builder: CompletionLogprobs | None,
        first: bool,
    ) -> dict[str, Any]:
        """The choice of one chunk; ``piece`` is None if no token was requested."""
        pieces, logprobs = [piece] if piece else [], None
        if builder is not None:
            prompt = builder.of_prompt(one.prompt_tokens if first and self.body.echo else [])
            logprobs = joined(prompt, builder.of_pieces(pieces))
        text = (self._echo(index, one) if first else "") + (piece.text if piece else "")
        reason = piece.finish if piece else one.finish_reason
        return _choice(index, text, logprobs, finish(reason))


def _choice(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
