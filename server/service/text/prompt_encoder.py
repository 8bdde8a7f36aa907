"""Prompts → token ids, and texts → tokens with offsets, at a bounded cost.

A text whose length shows that it can't fit is refused before it is encoded. A short text is encoded on the
event loop, a longer one by ``EncodingThreads``, until the request's deadline.
"""

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeVar

from server.errors import BadRequest, DeadlinePassed, Invalid, PromptTooLong
from server.service.chat.renderer import ChatRenderer
from server.service.continuation import Conversation, GenerationRequest
from server.service.text.codec import TextCodec, TokenSpan
from server.service.text.control_tokens import ControlTokens
from server.service.text.encoding_threads import EncodingThreads

NO_TEMPLATE = "this model has no chat template; use /v1/completions"
_SHORT = 400  # characters that the event loop encodes without yielding first
_T = TypeVar("_T")


class Tokens:
    """A text's tokens in twelve bytes each; as Python objects they need thirty times as much."""

    def __init__(self, text: str, spans: Iterator[TokenSpan]) -> None:
        self._text = text
        self._ids, self._starts, self._stops = array("I"), array("I"), array("I")
        for span in spans:
            self._ids.append(span.id)
            self._starts.append(span.start)
            self._stops.append(span.stop)

    def __len__(self) -> int:
        return len(self._ids)

    def spans(self, first: int, count: int) -> Iterator[TokenSpan]:
        """The tokens ``first`` … ``first + count`` − 1, as far as there are any."""
        part = slice(first, first + count)
        for id_, start, stop in zip(self._ids[part], self._starts[part], self._stops[part], strict=True):
            yield TokenSpan(id_, self._text[start:stop], start, stop)


class PromptEncoder:
    """Encodes the prompts of one model. Event loop only.

    Args:
        codec: the model's tokenizer.
        vocabulary: the number of its token ids.
        max_input_tokens: limit of a prompt that is continued.
        max_total_tokens: limit of a prompt that is only scored.
        chat: renders conversations; None where the model has no chat template.
    """

    def __init__(
        self,
        codec: TextCodec,
        vocabulary: int,
        max_input_tokens: int,
        max_total_tokens: int,
        chat: ChatRenderer | None = None,
    ) -> None:
        self._codec, self._vocabulary, self._chat = codec, vocabulary, chat
        self._max_input, self._max_total = max_input_tokens, max_total_tokens
        self._control = ControlTokens(codec.vocabulary.special_names)
        self._threads = EncodingThreads()

    async def encode(self, request: GenerationRequest, deadline: float) -> list[int]:
        """The prompt's ids, all of them in the vocabulary; at least one.

        Args:
            deadline: in ``time.perf_counter()`` seconds.

        Raises:
            Invalid: also ``PromptTooLong``, where the text's length shows that it can't fit.
            DeadlinePassed
        """
        if (request.truncate or 0) > self._max_total:
            raise Invalid(f"truncate: at most {self._max_total} tokens", param="truncate")
        ids = await _until(deadline, self._ids(request, deadline))
        if not ids:
            raise Invalid("the input has no tokens", param="inputs")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise Invalid(f"token ids go from 0 to {self._vocabulary - 1}", param="inputs")
        return ids[-request.truncate :] if request.truncate else ids

    async def tokenize(self, text: str, deadline: float) -> Tokens:
        """The text's tokens with offsets, without a limit of their number.

        Raises:
            DeadlinePassed
        """
        return await _until(
            deadline, self._threads.run(lambda: Tokens(text, iter(self._codec.tokenize(text))))
        )

    def close(self) -> None:
        """Stops the encoding threads; no other method may be called afterwards."""
        self._threads.close()

    async def _ids(self, request: GenerationRequest, deadline: float) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, str):
            return await self._encoded(prompt, request, self._codec.encode)
        text = await self._rendered(prompt, deadline)
        return await self._encoded(text, request, self._codec.encode_conversation)

    async def _rendered(self, conversation: Conversation, deadline: float) -> str:
        if self._chat is None:
            raise BadRequest(NO_TEMPLATE, param="inputs")
        return await self._chat.render(self._control.as_text(conversation.messages), deadline)

    async def _encoded(
        self, text: str, request: GenerationRequest, encode: Callable[[str], list[int]]
    ) -> list[int]:
        if (length := self._codec.token_length) is not None:
            if request.truncate:
                text = length.end(text, request.truncate)
            else:
                self._check_length(length.fewest(text), request)
        if self._codec.is_quick(text):
            if len(text) > _SHORT:
                await asyncio.sleep(0)  # a request may have a hundred prompts, encoded one after another
            return encode(text)
        return await self._threads.run(partial(encode, text))

    def _check_length(self, fewest: int, request: GenerationRequest) -> None:
        most = self._max_total if request.max_new_tokens == 0 else self._max_input
        if fewest > most:
            read = "messages" if isinstance(request.prompt, Conversation) else "prompt"
            raise too_long(
                self._max_total,
                f"your {read} resulted in at least {fewest} tokens, of which {most} are accepted",
                "inputs",
            )


def too_long(context: int, why: str, param: str) -> PromptTooLong:
    """The error, in the words by which client libraries recognize it."""
    return PromptTooLong(
        f"This model's maximum context length is {context} tokens. However, {why}", param=param
    )


async def _until(deadline: float, work: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(deadline - time.perf_counter()):
            return await work
    except TimeoutError:
        raise DeadlinePassed("the text was not encoded in time") from None
