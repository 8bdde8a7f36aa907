"""Quality of loaded models against a reference, on the same text, from their logits.

Each model makes one teacher-forced pass over the text, a batch of windows at a time. Memory doesn't depend
on the text: only the logits of the reference and of one candidate exist at a time, those of a batch or of a
chunk of one long window (see ``passes``). A divergence needs both distributions, so the reference and at
least one candidate are loaded together; where memory is short, measure one candidate after another.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loaders.base import Progress, ignore_progress
from loaders.quality import greedy
from loaders.quality.divergence import Mean, Quantiles, TokenFigures, compare, exponential
from loaders.quality.errors import QualityError
from loaders.quality.greedy import GreedyDivergence
from loaders.quality.passes import Passes, ScoredModel, Scorer
from loaders.texts.text import Text, TokenStream, Window, batches, windows

__all__ = [
    "GreedyDivergence",
    "Passes",
    "Quality",
    "QualityError",
    "measure",
]


@dataclass(frozen=True)
class Quality:
    """One model against the reference.

    Args:
        precision, reference: of the two models.
        text: its name.
        tokens: of the text.
        scored: tokens with a prediction: all but the first of each window without context.
        window, stride: in tokens.
        batch: windows computed together, at most.
        perplexity, reference_perplexity: per token: exp of the mean −ln p.
        bits_per_byte: mean −log₂ p a token × tokens ÷ bytes of the text.
        perplexity_ratio: perplexity ÷ the reference's.
        perplexity_ratio_error: its standard error: ratio × standard error of the mean of the tokens' paired
            differences −ln q + ln p (delta method), by blocks of 64 tokens; None for a text of one block.
        mean_kl, median_kl, p99_kl, max_kl: KL divergence from the reference, nats a token.
        mean_kl_error: standard error of the mean, by the same blocks.
        top1_agreement: fraction of the tokens for which both have the same most probable token.
        rms_delta_p: root mean square difference of the true token's probability.
        greedy: length of the agreement of greedy continuations; None if not measured.
        seconds, reference_seconds: of the forward passes over the text.
    """

    precision: str
    reference: str
    text: str
    tokens: int
    scored: int
    window: int
    stride: int
    batch: int
    perplexity: float
    reference_perplexity: float
    bits_per_byte: float
    perplexity_ratio: float
    perplexity_ratio_error: float | None
    mean_kl: float
    mean_kl_error: float | None
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    rms_delta_p: float
    greedy: GreedyDivergence | None
    seconds: float
    reference_seconds: float


class _Totals:
    """The figures of one candidate, accumulated."""

    def __init__(self, scorer: Scorer) -> None:
        self.model, self.scorer = scorer.model, scorer
        self.nll, self.reference_nll, self.excess = Mean(), Mean(), Mean()
        self.kl, self.agrees, self.squared_delta_p = Mean(), Mean(), Mean()
        self.kl_quantiles = Quantiles()

    def add(self, figures: TokenFigures) -> None:
        if not torch.isfinite(figures.nll + figures.reference_nll + figures.kl).all():
            raise QualityError(f"{self.model.precision} gives logits that are not numbers, or infinite")
        self.nll.add(figures.nll)
        self.reference_nll.add(figures.reference_nll)
        self.excess.add(figures.nll - figures.reference_nll)
        self.kl.add(figures.kl)
        self.kl_quantiles.add(figures.kl)
        self.agrees.add(figures.agrees)
        self.squared_delta_p.add(figures.delta_p.square())

    def figures(self, stream: TokenStream) -> dict[str, Any]:
        ratio, error = exponential(self.excess.mean), self.excess.standard_error
        return {
            "precision": self.model.precision,
            "seconds": self.scorer.seconds,
            "tokens": stream.tokens,
            "scored": self.nll.count,
            "perplexity": exponential(self.nll.mean),
            "reference_perplexity": exponential(self.reference_nll.mean),
            "bits_per_byte": self.nll.mean / math.log(2) * stream.tokens / stream.bytes,
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": None if error is None else ratio * error,
            "mean_kl": self.kl.mean,
            "mean_kl_error": self.kl.standard_error,
            "median_kl": self.kl_quantiles.at(0.5),
            "p99_kl": self.kl_quantiles.at(0.99),
            "max_kl": self.kl_quantiles.largest,
            "top1_agreement": self.agrees.mean,
            "rms_delta_p": math.sqrt(self.squared_delta_p.mean),
        }


def measure(
    reference: ScoredModel,
    candidates: Sequence[ScoredModel],
    text: Text,
    tokenizer: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    prompts: int = greedy.PROMPTS,
    progress: Progress = ignore_progress,
) -> list[Quality]:
    """Measures each candidate against the reference on ``text``.

    Args:
        tokenizer: of the checkpoint of all models.
        window: tokens per window; the models' context if None.
        stride: tokens between windows; half the window if None.
        batch: windows per pass; by default as many as speed it up. Bounded by memory.
        prompts: number of prompts to continue greedily, evenly spaced in the text.
        progress: called with ("scoring", tokens, estimated tokens of the text), then ("continuing", …).

    Raises:
        TextError: the text is empty, too short or not UTF-8; window or stride don't fit; logits are NaN.
    """
    passes = Passes.of([reference, *candidates], window, stride, batch)
    stream = TokenStream(text, tokenizer, vocabulary=reference.runner.vocabulary)
    scorer = Scorer(reference, passes)
    # the reference as a candidate is not computed twice
    totals = [_Totals(scorer if model is reference else Scorer(model, passes)) for model in candidates]
    chosen = greedy.Prompts(prompts, passes.window)
    if not _score(scorer, totals, stream, passes, chosen, progress):
        raise QualityError(f"{text.name} has {stream.tokens} tokens; at least two are needed")
    continued = _continue(reference, totals, chosen, progress) if prompts else [None] * len(totals)
    shared: dict[str, Any] = {
        "reference": reference.precision,
        "text": text.name,
        "window": passes.window,
        "stride": passes.stride,
        "batch": passes.batch,
        "reference_seconds": scorer.seconds,
    }
    return [
        Quality(**shared, **one.figures(stream), greedy=length)
        for one, length in zip(totals, continued, strict=True)
    ]


def _score(
    reference: Scorer,
    totals: Sequence[_Totals],
    stream: TokenStream,
    passes: Passes,
    chosen: greedy.Prompts,
    progress: Progress,
) -> int:
    """Passes over the text; returns the number of scored tokens, all but the first."""
    scored = 0
    for several in batches(windows(stream, passes.window, passes.stride), passes.batch):
        _compare(reference, totals, several)
        for one in several:
            chosen.offer(one)
            scored += len(one.scored)
        progress("scoring", 1 + scored, stream.expected_tokens())
    return scored


def _compare(reference: Scorer, totals: Sequence[_Totals], batch: Sequence[Window]) -> None:
    """Adds a batch to all totals; its logits are freed on return."""
    targets = torch.tensor([id_ for window in batch for id_ in window.scored])
    others = [None if one.scorer is reference else one.scorer.logits(batch) for one in totals]
    parts: list[list[TokenFigures]] = [[] for _ in totals]
    for expected in reference.logits(batch):
        following, targets = targets[: len(expected)], targets[len(expected) :]
        for part, other in zip(parts, others, strict=True):
            found = expected if other is None else next(other)
            with _few_threads():
                part.append(compare(expected, found, following))
            del found  # freed before the next candidate's
        del expected  # freed before the next one
    for one, part in zip(totals, parts, strict=True):
        # per window: blocks of correlated tokens end with it
        for figures in TokenFigures.joined(part).split([len(window.scored) for window in batch]):
            one.add(figures)


@contextmanager
def _few_threads() -> Iterator[None]:
    """Sets torch's threads to one if there are at most two.

    The comparison is many short operations, after each of which threads synchronize. Two were no faster than
    one, and twenty times slower beside another busy process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads <= 2 else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _continue(
    reference: ScoredModel, totals: Sequence[_Totals], prompts: greedy.Prompts, progress: Progress
) -> list[GreedyDivergence | None]:
    chosen, total = prompts.chosen(), len(totals) + 1
    # the same batches for every model, since the rounding of some kernels depends on the batch
    rows = min(model.runner.slots for model in (reference, *(one.model for one in totals)))
    progress("continuing", 0, total)
    expected = greedy.continuations(reference.runner, chosen, prompts.tokens, rows)
    found: list[GreedyDivergence | None] = []
    for one in totals:
        progress("continuing", len(found) + 1, total)
        found.append(greedy.divergence(one.model.runner, chosen, expected, rows))
    progress("continuing", total, total)
    return found
