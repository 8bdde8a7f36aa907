"""``POST /v1/chat/completions``: the next turn of a conversation."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.engine.sequence import drawn_seed
from server.http.streaming import event
from server.routes.generation_request import make_request
from server.routes.openai.format import chat_logprobs, finish, running_usage, usage
from server.routes.openai.merge import merged
from server.routes.openai.schemas import ChatBody
from server.routes.precision_choice import PrecisionChoice, model_of
from server.routes.shared import SEEDS, headers, run_all, served, stream_all, timings, whole
from server.service.generation import Continuation, Conversation, GenerationRequest, Piece


@dataclass
class Chat:
    """One chat request, from its validated body to its response."""

    request: Request
    body: ChatBody
    requested: PrecisionChoice
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        model = model_of(self.request)
        self.codec = model.codec
        self.model: str = self.body.model or model.name

    async def answer(self) -> Response:
        return await (self._stream() if self.body.stream else self._whole())

    def _requests(self) -> list[GenerationRequest]:
        body = self.body
        prompt = Conversation([message.model_dump() for message in body.messages])
        first = drawn_seed() if body.chosen_seed is None else body.chosen_seed
        sampling = body.parameters(body.max_completion_tokens or body.max_tokens)
        return [
            make_request(
                prompt,
                sampling,
                requested=self.requested,
                fallback=body.fallback,
                seed=(first + i) % SEEDS,
                logprobs=bool(body.logprobs),
                top_n=(body.top_logprobs or 0) if body.logprobs else 0,
                more=body,
            )
            for i in range(body.n or 1)
        ]

    async def _whole(self) -> Response:
        done = await run_all(self.request, self._requests(), self.id)
        reply = self._frame("chat.completion", [self._choice(i, one) for i, one in enumerate(done)], done[0])
        reply["usage"] = usage(done[:1], done)
        return whole(self.request, reply, headers(done[0]))

    def _choice(self, index: int, done: Continuation) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": done.text, "refusal": None},
            "logprobs": chat_logprobs(done.pieces, self.codec) if self.body.logprobs else None,
            "finish_reason": finish(done.finish_reason),
        }

    def _frame(self, kind: str, choices: list[dict[str, Any]], one: Continuation) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **served(one),
        }

    async def _stream(self) -> Response:
        return await stream_all(self.request, self._requests(), self._events, self.id)

    async def _events(self, opened: list[Continuation]) -> AsyncGenerator[bytes]:
        for index, one in enumerate(opened):
            yield self._chunk(index, {"role": "assistant", "content": ""}, one, 0)
        async with aclosing(merged(opened)) as items:
            async for index, pieces in items:
                one = opened[index]
                yield b"".join(chunk for piece in pieces for chunk in self._chunks(index, piece, one))
        if self.body.includes_usage:
            frame = self._frame("chat.completion.chunk", [], opened[0])
            yield event({**frame, "usage": usage(opened[:1], opened)})
        yield event("[DONE]")

    def _chunks(self, index: int, piece: Piece, one: Continuation) -> Iterator[bytes]:
        logprobs = chat_logprobs([piece], self.codec) if self.body.logprobs else None
        yield self._chunk(index, {"content": piece.text}, one, piece.index, logprobs)
        if piece.finish:
            yield self._chunk(index, {}, one, piece.index, reason=finish(piece.finish))

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        one: Continuation,
        generated: int,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        frame = self._frame("chat.completion.chunk", [choice], one)
        if self.body.continuous_usage:
            frame["usage"] = running_usage(one, generated)
        if reason:
            frame["timings"] = timings(one)
        return event(frame)
