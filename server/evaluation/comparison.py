"""One prompt in several precisions, in turn: texts, speed, and the divergence of each from a reference.

Each precision first continues the prompt. Then it scores the prompt as a sequence that generates nothing, in
chunks, so that the engine's other sequences keep decoding.
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
from server.observability.ended import Ended
from server.service.text.codec import TextCodec
from server.service.text_stream import TextStream

Use = Callable[[str], AbstractAsyncContextManager[Engine]]
"""Precision → a context manager of its engine, which is loaded if necessary."""
Observe = Callable[[Ended], None]


@dataclass(frozen=True)
class ComparisonRequest:
    """What every precision computes.

    Args:
        ids: the prompt.
        params: how to continue it; the seed is the same for all.
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
        """From arrival to the first token."""
        line = self.timeline
        return 1000 * (line.queue_seconds + line.prefill_seconds)

    @property
    def tokens_per_second(self) -> float:
        """From admission on."""
        active = self.timeline.prefill_seconds + self.timeline.decode_seconds
        return len(self.ids) / active if active > 0 else 0.0


@dataclass(frozen=True)
class Compared:
    """One precision's result.

    Args:
        total_bytes: of its weights and KV cache.
        prompt: divergence from the reference on the prompt.
        first_divergence: index of the first generated token that differs from the reference's, if any.
    """

    precision: str
    written: Written
    total_bytes: int
    prompt: PromptFigures
    first_divergence: int | None


@dataclass(frozen=True)
class Reference:
    """A finished run of the reference.

    Args:
        logits: after each token of the prompt, (tokens, vocabulary) float32.
        generated: the ids of its continuation.
    """

    logits: Tensor
    generated: list[int]


def _ignore(ended: Ended) -> None:
    pass


class Comparison:
    """Compares precisions on one prompt.

    Args:
        request: what each precision computes.
        codec: the checkpoint's tokenizer.
        use: provides the engines.
        observe: called after each generation.
        reference: of a comparison in another process; every run is compared with it.
    """

    def __init__(
        self,
        request: ComparisonRequest,
        codec: TextCodec,
        use: Use,
        observe: Observe = _ignore,
        reference: Reference | None = None,
    ) -> None:
        self._request, self._codec, self._use, self._observe = request, codec, use, observe
        self._reference = ReferenceLogits(request.ids)
        self._expected: list[int] | None = None
        if reference is not None:
            self._reference.add(reference.logits)
            self._expected = reference.generated

    @property
    def reference(self) -> Reference:
        """What the first run found, for a comparison in another process."""
        assert self._expected is not None, "the reference has not run"
        return Reference(self._reference.logits, self._expected)

    async def run(self, precision: str) -> Compared:
        """The precision's result. The first run's is the reference of all others.

        Raises:
            ServiceError: the engine is not available or failed. A failed reference may be run again.
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
        request = self._request
        with closing(engine.generate(request.ids, request.params)) as tokens:
            stream = TextStream(tokens, self._codec, request.ids, request.stop)
            try:
                await stream.run()
            finally:
                self._observe(stream.ended(engine.precision))
        ids = [piece.token.id for piece in stream.pieces]
        return Written(stream.text, ids, stream.finish_reason, stream.timeline)

    async def _score_reference(self, engine: Engine) -> PromptFigures:
        self._reference = ReferenceLogits(self._request.ids)
        await _observed(engine, self._request.ids, self._reference.add)
        work = partial(self._against_itself, engine.precision)
        # on a single core, so that streams keep the others
        return await asyncio.to_thread(run_in_own_thread, work, 1)

    def _against_itself(self, precision: str) -> PromptFigures:
        against = Against(self._reference)
        against.add(self._reference.logits)
        return _figures(against, precision)

    async def _score(self, engine: Engine) -> PromptFigures:
        against = Against(self._reference)
        await _observed(engine, self._request.ids, against.add)
        return _figures(against, engine.precision)


async def _observed(engine: Engine, ids: list[int], observe: Callable[[Tensor], None]) -> None:
    """Computes the prompt without generating a token; passes the prompt's logits to ``observe``."""
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
    """Index of the first difference, which may be the end of the shorter one; None if they are equal."""
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))
