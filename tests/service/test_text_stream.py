"""From tokens to text: what is ready comes at once, and the stream is closed where the text ends."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import pytest

from server.engine.sequence import FinishReason, SamplingParams, Sequence, Token
from server.engine.token_stream import TokenStream
from server.errors import GenerationFailed, ServiceError
from server.service.continuation import Continuation
from server.service.text.codec import TextCodec
from server.service.text_stream import Piece, TextStream
from tests.checkpoints import byte_tokenizer
from tests.conftest import PATIENCE

CODEC = TextCodec(byte_tokenizer())
PROMPT = CODEC.encode("In")
TEXT = " the end"
IDS = CODEC.encode(TEXT)


class Source:
    """A token stream that the test feeds."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.stream = TokenStream(Sequence(PROMPT, SamplingParams(max_new_tokens=99)), self._cancel)

    def _cancel(self, sequence: Sequence) -> None:
        self.cancelled += 1

    def put(self, ids: list[int], finish: FinishReason | None = None) -> None:
        for at, id_ in enumerate(ids, 1):
            self.stream.put(Token(id_, -1.0, finish=finish if at == len(ids) else None))

    def text(self, *stop: str) -> TextStream:
        return TextStream(self.stream, CODEC, PROMPT, stop)


def run(test: Callable[[Source], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Source()), PATIENCE)

    asyncio.run(main())


def joined(chunk: list[Piece]) -> str:
    return "".join(piece.text for piece in chunk)


def test_a_chunk_is_all_that_is_ready() -> None:
    async def test(source: Source) -> None:
        text, chunks = source.text(), []
        source.put(IDS[:3])
        async with aclosing(text.chunks()) as coming:
            async for chunk in coming:
                chunks.append(chunk)
                if len(chunks) == 1:
                    source.put(IDS[3:], "length")
        assert [len(chunk) for chunk in chunks] == [3, len(IDS) - 3]
        assert "".join(map(joined, chunks)) == text.text == TEXT
        assert [piece.index for piece in text.pieces] == list(range(1, len(IDS) + 1))
        assert [piece.token.id for piece in text.pieces] == IDS
        assert (text.finish_reason, text.outcome, text.mean_logprob) == ("length", "success", -1.0)

    run(test)


def test_a_stop_string_closes_the_stream_before_the_last_chunk_is_yielded() -> None:
    async def test(source: Source) -> None:
        text = source.text("end")
        source.put([*IDS, *IDS])
        coming: AsyncGenerator[list[Piece], None] = text.chunks()
        assert joined(await anext(coming)) == " the "
        assert source.cancelled == 1
        assert (text.finish_reason, text.outcome) == ("stop_sequence", "success")
        with pytest.raises(StopAsyncIteration):
            await anext(coming)
        assert len(text.pieces) == len(IDS)

    run(test)


def test_text_that_may_begin_a_stop_string_is_released_at_the_end() -> None:
    async def test(source: Source) -> None:
        text = source.text("ends")
        source.put(IDS)
        coming = text.chunks()
        assert joined(await anext(coming)) == " the "
        source.put(CODEC.encode("!"), "length")
        assert joined(await anext(coming)) == "end!"
        assert text.finish_reason == "length"

    run(test)


def test_a_stop_token_is_no_text() -> None:
    async def test(source: Source) -> None:
        source.put(IDS, "stop_sequence")
        text = await source.text().run()
        assert text.text == CODEC.decode(IDS[:-1])
        assert len(text.pieces) == len(IDS)

    run(test)


def test_what_was_generated_before_an_error_comes_before_it() -> None:
    async def test(source: Source) -> None:
        text = source.text()
        source.put(IDS[:2])
        source.stream.put(GenerationFailed("a broken kernel"))
        with pytest.raises(GenerationFailed):
            await text.run()
        assert text.text == CODEC.decode(IDS[:2])
        assert (text.finish_reason, text.outcome) == (None, GenerationFailed.error_type)

    run(test)


def test_a_sequence_without_tokens_ends_by_its_length() -> None:
    async def test(source: Source) -> None:
        source.stream.put(None)
        text = await source.text().run()
        assert (text.text, text.pieces, text.mean_logprob) == ("", [], 0.0)
        assert (text.finish_reason, text.outcome) == ("length", "success")

    run(test)


def test_closed_early_it_counts_as_cancelled() -> None:
    async def test(source: Source) -> None:
        text = source.text()
        source.put(IDS[:2])
        async with aclosing(text.chunks()) as coming:
            await anext(coming)
        text.close()
        assert source.cancelled == 1
        assert text.outcome == "cancelled"

    run(test)


def test_a_continuation_reads_tokens_as_a_text_stream_does() -> None:
    """Without a layer of its own between: each would cost every token of every stream."""
    for name in ("chunks", "run", "_chunk", "_piece", "text", "outcome"):
        assert getattr(Continuation, name) is getattr(TextStream, name)


def test_a_tokenizer_that_fails_on_a_token_fails_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(source: Source) -> None:
        text = source.text()

        def fail(ids: list[int]) -> str:
            raise GenerationFailed("the model's tokenizer fails to decode these tokens")

        with monkeypatch.context() as patch:
            patch.setattr(CODEC.vocabulary, "decode", fail)
            source.put(IDS)
            with pytest.raises(ServiceError):
                await text.run()
        assert text.outcome == GenerationFailed.error_type

    run(test)
