"""The quality of every measured engine: its distributions against fp32's, on the same tokens."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from loaders import quality
from loaders.base import LoadedModel
from loaders.quality import Quality
from loaders.quality.passes import MOST_LOGITS, ScoredModel
from loaders.runner import Logits, Runner
from loaders.texts import Text, TokenStream
from server.bench.contenders import Contender
from server.bench.processes import RemoteContender
from server.bench.session import MakeContender
from server.host.threads import run_in_own_thread

REFERENCE = "fp32"
BITDIAL = "bitdial"
WINDOW = 512  # tokens with a common past; each engine starts anew with the next window
_BLOCK = 1024  # bytes
_CHANCE = 0.5
"""A perplexity above this share of the vocabulary is that of chance: a uniform distribution has all of it."""


class RemoteRunner(Runner):
    """The logits of an engine in another process. It has no cache: every call computes the whole text.

    Args:
        context, vocabulary: of the model.
    """

    slots = 1
    kv_cache_bytes = 0

    def __init__(self, engine: RemoteContender, context: int, vocabulary: int) -> None:
        self._engine, self.context, self.vocabulary = engine, context, vocabulary
        self._texts: dict[int, list[int]] = {}

    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        text = self._texts.setdefault(slot, [])
        text.extend(ids)
        if logits == "none":
            return None
        return self.score_together([text], len(ids) if logits == "all" else 1)[0]

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        rows = [self.prefill(slot, [id_]) for slot, id_ in zip(slots, ids, strict=True)]
        return torch.cat([row for row in rows if row is not None])

    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        return torch.from_numpy(self._engine.score([list(text) for text in texts], kept))

    def free(self, slot: int) -> None:
        self._texts.pop(slot, None)

    def close(self) -> None:
        self._texts.clear()


@dataclass(frozen=True)
class RemoteModel:
    """An engine in another process, as ``loaders.quality`` sees it."""

    precision: str
    runner: Runner
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Qualities:
    """Measures engines, each once.

    Args:
        load: loads one of bitdial's precisions; ``loaders.load`` but for the arguments that all share.
        text: its first ``tokens`` are scored.
        context, vocabulary: of the model.
    """

    load: Callable[[str], LoadedModel]
    text: Text
    tokenizer: Any
    context: int
    vocabulary: int
    threads: int
    found: dict[tuple[str, str], Quality] = field(default_factory=dict)
    """By precision and engine."""
    is_trained: bool = True
    """Whether fp32 predicts the text better than chance. If not, the weights are random, and a divergence
    from what they predict means nothing."""
    _reference: LoadedModel | None = None

    @property
    def window(self) -> int:
        return min(WINDOW, self.context, MOST_LOGITS // self.vocabulary)

    @contextmanager
    def reference(self) -> Iterator[bool]:
        """Loads fp32 and measures it; yields ``is_trained``.

        Raises:
            LoaderError, TextError
        """
        model = self.load(REFERENCE)
        try:
            [own] = self._measure(model, [model])
            self.found[REFERENCE, BITDIAL] = own
            self._reference = model
            self.is_trained = own.perplexity < _CHANCE * self.vocabulary
            yield self.is_trained
        finally:
            self._reference = None
            model.close()

    async def add(self, precision: str, others: Sequence[MakeContender]) -> None:
        """Measures the precision and other engines. Within ``reference`` only.

        Raises:
            LoaderError, TextError, BenchError
        """
        assert self._reference is not None
        contenders: list[Contender] = []
        own = None if precision == REFERENCE else self.load(precision)
        try:
            for make in others:
                contenders.append(await make())
            models: dict[str, ScoredModel] = {} if own is None else {BITDIAL: own}
            models |= {one.name: self._remote(one) for one in contenders if isinstance(one, RemoteContender)}
            measured = await asyncio.to_thread(self._measure, self._reference, list(models.values()))
            self.found |= {(precision, name): one for name, one in zip(models, measured, strict=True)}
        finally:
            for contender in contenders:
                await contender.close()
            if own is not None:
                own.close()

    @property
    def shown(self) -> Mapping[tuple[str, str], Quality]:
        """What has a meaning: nothing if the weights are random."""
        return self.found if self.is_trained else {}

    def heading(self) -> str:
        """The text and the conditions, in a sentence."""
        own = self.found[REFERENCE, BITDIAL]
        if not self.is_trained:
            return (
                f"The weights predict no better than chance (perplexity {own.perplexity:,.0f}, vocabulary "
                f"{self.vocabulary:,}): they are random, so there is no quality to compare."
            )
        return (
            f"Speed beside quality. Quality: the first {own.tokens:,} tokens of {own.text}, in windows of "
            f"{own.window}, {own.scored:,} of them scored."
        )

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        own = self.found[REFERENCE, BITDIAL]
        return {
            "text": own.text,
            "tokens": own.tokens,
            "scored": own.scored,
            "window": own.window,
            "trained": self.is_trained,
            "engines": [
                asdict(one) | {"precision": precision, "engine": engine}
                for (precision, engine), one in self.found.items()
            ],
        }

    def _remote(self, engine: RemoteContender) -> ScoredModel:
        return RemoteModel(engine.name, RemoteRunner(engine, self.context, self.vocabulary))

    def _measure(self, reference: LoadedModel, models: Sequence[ScoredModel]) -> list[Quality]:
        if not models:
            return []
        window = self.window
        return run_in_own_thread(
            lambda: quality.measure(
                reference, models, self.text, self.tokenizer, window=window, stride=window, prompts=0
            ),
            self.threads,
        )


def excerpt(text: Text, tokenizer: Any, tokens: int) -> Text:
    """The beginning of a text, of at least so many tokens, up to the end of a word; all of a shorter text."""
    stream = TokenStream(text, tokenizer, _BLOCK)
    for _ in islice(stream, tokens):  # encodes as many blocks as it takes
        pass
    data = b""
    for piece in text.pieces(_BLOCK):
        data += piece.encode()
        if len(data) >= stream.bytes:
            break
    return replace(text, size=len(data), open=lambda: BytesIO(data))
