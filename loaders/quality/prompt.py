"""One prompt through several models: each one's distributions against the reference's, as logits come.

The reference's logits are kept (prompt × vocabulary, float32); the others' are looked at and let go, chunk
by chunk, so that a prompt can be computed in chunks between other work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.quality.divergence import TokenFigures, compare, exponential
from loaders.quality.text import QualityError

MOST_LOGITS = 2**28
"""Of a reference's that are kept: a gigabyte."""


def longest_prompt(vocabulary: int) -> int:
    """Tokens of a prompt whose logits may be kept."""
    return max(1, MOST_LOGITS // vocabulary)


@dataclass(frozen=True)
class PromptFigures:
    """One model on one prompt.

    Args:
        prompt_perplexity: per token, all but the first; None for a prompt of one token.
        mean_kl, max_kl: divergence from the reference's distributions after each prompt token, the last
            included, in nats.
        top1_agreement: share of the prompt's tokens after which both find the same one the most probable.
    """

    prompt_perplexity: float | None
    mean_kl: float
    max_kl: float
    top1_agreement: float


class ReferenceLogits:
    """Collects what the reference computes.

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
    """One model's logits as they come, against the reference's, which are complete."""

    def __init__(self, reference: ReferenceLogits) -> None:
        self._reference = reference
        ids = reference.ids
        self._targets = torch.tensor([*ids[1:], 0])  # nothing follows the last: its target doesn't count
        self._done = 0
        self._figures: list[TokenFigures] = []

    def add(self, logits: Tensor) -> None:
        """The logits after the next tokens, (tokens, vocabulary)."""
        chunk = slice(self._done, self._done + len(logits))
        self._figures.append(compare(self._reference.logits[chunk], logits, self._targets[chunk]))
        self._done += len(logits)

    def figures(self) -> PromptFigures:
        """Raises:
        QualityError: logits that are not numbers, or so far apart that there is no perplexity.
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
