"""One prompt in several precisions, one after another: texts, speed, and how far each is from a reference.

Each precision first continues the prompt, undisturbed by the others; then it scores the prompt itself, as a
sequence that generates nothing: in chunks between the steps of whatever else its engine is doing.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from loaders.quality import QualityError
from loaders.quality.prompt import Against, PromptFigures, ReferenceLogits
from server.engine.engine import Engine
from server.engine.sequence import FinishReason, SamplingParams, Timeline
from server.errors import GenerationFailed
from server.host import memory
from server.host.threads import run_in_own_thread
from server.service.text.codec import TextCodec
from server.service.text_stream import TextStream

Use = Callable[[str], AbstractAsyncContextManager[Engine]]
"""The engine of a precision, loaded if it must be, for as long as it is needed."""
Observe = Callable[[str, str, Timeline, int], None]
"""Told of each generation: precision, outcome, times, prompt tokens."""


@dataclass(frozen=True)
class Wish:
    """What every precision is to do.

    Args:
        ids: the prompt.
        params: how to continue it; a sampling one has a seed, the same for all.
        stop: strings that end the text.
    """

    ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """A continuation and its times."""

    text: str
    ids: list[int]
    finish_reason: FinishReason | None
    timeline: Timeline

    @property
    def ttft_ms(self) -> float:
        """Arrival to first token."""
        line = self.timeline
        return 1000 * (line.queue_seconds + line.prefill_seconds)

    @property
    def tokens_per_second(self) -> float:
        """From admission on."""
        active = self.timeline.prefill_seconds + self.timeline.decode_seconds
        return len(self.ids) / active if active > 0 else 0.0


@dataclass(frozen=True)
class Compared:
    """One precision on the prompt.

    Args:
        total_bytes: its weights and KV cache.
        prompt: its distributions on the prompt against the reference's.
        first_divergence: index of the first generated token that differs from the reference's; None: none.
    """

    precision: str
    written: Written
    total_bytes: int
    prompt: PromptFigures
    first_divergence: int | None


def _unheard(precision: str, outcome: str, timeline: Timeline, prompt_tokens: int) -> None:
    pass


class Comparison:
    """Of one prompt.

    Args:
        wish: what each precision does.
        codec: the checkpoint's tokenizer.
        use: where engines come from.
        observe: told of each generation.
    """

    def __init__(self, wish: Wish, codec: TextCodec, use: Use, observe: Observe = _unheard) -> None:
        self._wish, self._codec, self._use, self._observe = wish, codec, use, observe
        self._reference = ReferenceLogits(wish.ids)
        self._expected: list[int] | None = None

    async def run(self, precision: str) -> Compared:
        """The first one run is the reference of those that follow.

        Raises:
            ServiceError: it can't be had, or it failed. A reference that failed may be run again.
        """
        async with self._use(precision) as engine:
            written = await self._write(engine)
            figures = await (self._score_reference if self._expected is None else self._score)(engine)
            size = memory.used_bytes(engine.model)
        if self._expected is None:
            self._expected = written.ids
        differs = first_divergence(self._expected, written.ids)
        return Compared(precision, written, size, figures, differs)

    async def _write(self, engine: Engine) -> Written:
        wish = self._wish
        with closing(engine.generate(wish.ids, wish.params)) as tokens:
            stream = TextStream(tokens, self._codec, wish.ids, wish.stop)
            try:
                await stream.run()
            finally:
                self._observe(engine.precision, stream.outcome, stream.timeline, len(wish.ids))
        ids = [piece.token.id for piece in stream.pieces]
        return Written(stream.text, ids, stream.finish_reason, stream.timeline)

    async def _score_reference(self, engine: Engine) -> PromptFigures:
        self._reference = ReferenceLogits(self._wish.ids)
        await _observed(engine, self._wish.ids, self._reference.add)
        work = partial(self._against_itself, engine.precision)
        return await asyncio.to_thread(
            run_in_own_thread, work, 1
        )  # of one core, so that streams keep the others

    def _against_itself(self, precision: str) -> PromptFigures:
        against = Against(self._reference)
        against.add(self._reference.logits)
        return _figures(against, precision)

    async def _score(self, engine: Engine) -> PromptFigures:
        against = Against(self._reference)
        await _observed(engine, self._wish.ids, against.add)
        return _figures(against, engine.precision)


async def _observed(engine: Engine, ids: list[int], observe: Callable[[Tensor], None]) -> None:
    """Computes the prompt and nothing after it."""
    params = SamplingParams(max_new_tokens=0)
    with closing(engine.generate(ids, params, observe=observe)) as tokens:
        async for _ in tokens:
            pass


def _figures(against: Against, precision: str) -> PromptFigures:
    try:
        return against.figures()
    except QualityError as error:
        raise GenerationFailed(f"{precision}: {error}") from None


def first_divergence(expected: Sequence[object], found: Sequence[object]) -> int | None:
    """Index of the first difference; where one goes on after the other's end, that is one."""
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))
