"""The distributions of several models on one prompt against those of a reference, chunk by chunk.

The logits of the reference are kept (prompt × vocabulary, float32); those of the others are compared and
freed chunk by chunk, so that a prompt can be computed in chunks between other work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.quality.divergence import TokenFigures, compare, exponential
from loaders.quality.errors import QualityError

MOST_LOGITS = 2**28
"""Logits of a reference that are kept at most: 1 GiB."""


def longest_prompt(vocabulary: int) -> int:
    """Most tokens of a prompt whose logits may be kept."""
    return max(1, MOST_LOGITS // vocabulary)


@dataclass(frozen=True)
class PromptFigures:
    """The figures of one model on one prompt.

    Args:
        prompt_perplexity: per token, all but the first; None for a prompt of one token.
        mean_kl, max_kl: divergence from the reference after each prompt token, including the last, in nats.
        top1_agreement: fraction of the prompt's tokens after which both have the same most probable token.
    """

    prompt_perplexity: float | None
    mean_kl: float
    max_kl: float
    top1_agreement: float


class ReferenceLogits:
    """Collects the logits of the reference.

    Args:
        ids: the prompt.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._logits = torch.empty(0, dtype=torch.float32)
        self._done = 0

    def add(self, logits: Tensor) -> None:
        """The logits after the next tokens, (tokens, vocabulary)."""
        if not self._done:
            self._logits = torch.empty(len(self.ids), logits.shape[1], dtype=torch.float32)
        self._logits[self._done : self._done + len(logits)] = logits
        self._done += len(logits)

    @property
    def logits(self) -> Tensor:
        """(tokens, vocabulary) float32 on the host, complete or not."""
        return self._logits[: self._done]


class Against:
    """Compares a model's logits, chunk by chunk, with the complete ones of the reference."""

    def __init__(self, reference: ReferenceLogits) -> None:
        self._reference = reference
        ids = reference.ids
        self._targets = torch.tensor([*ids[1:], 0])  # the last has no next token: its target is ignored
        self._done = 0
        self._figures: list[TokenFigures] = []

    def add(self, logits: Tensor) -> None:
        """The logits after the next tokens, (tokens, vocabulary)."""
        chunk = slice(self._done, self._done + len(logits))
        self._figures.append(compare(self._reference.logits[chunk], logits, self._targets[chunk]))
        self._done += len(logits)

    def figures(self) -> PromptFigures:
        """Raises:
        QualityError: logits are not finite, or the perplexity overflows.
        """
        kl = torch.cat([figures.kl for figures in self._figures])
        nll = torch.cat([figures.nll for figures in self._figures])[:-1]
        agrees = torch.cat([figures.agrees for figures in self._figures])
        if not (torch.isfinite(kl).all() and torch.isfinite(nll).all()):
            raise QualityError("the model gives logits that are not numbers")
        return PromptFigures(
            exponential(float(nll.mean())) if len(nll) else None,
            float(kl.mean()),
            float(kl.max()),
            float(agrees.mean()),
        )
