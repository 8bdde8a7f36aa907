"""Log-probabilities of tokens, of their alternatives and of a prompt, under the model's own distribution."""

import math
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from loaders import kernels
from loaders.kernels import summarize
from server.engine.faults import BadLogits
from server.engine.sequence import (
    MIN_LOGPROB,
    PromptToken,
    Sequence,
    Token,
    TokenLogprob,
)


def not_numbers() -> BadLogits:
    return BadLogits("the model returned logits that are not numbers")


def with_logprobs(
    token: Token | Exception, sequence: Sequence, logprob: float, *alternatives: float
) -> Token | Exception:
    """The token with the log-probabilities that its request reports.

    Args:
        alternatives: n ids, then their n log-probabilities.
    """
    if isinstance(token, Exception) or not sequence.params.reports:
        return token
    half = len(alternatives) // 2
    pairs = zip(map(int, alternatives[:half]), alternatives[half:], strict=True)
    top = tuple(TokenLogprob(*pair) for pair in pairs)[: sequence.params.top_n]
    return token._replace(logprob=logprob, top=top)


def prompt_logprobs(logits: Tensor, following: Rows[int], top_n: int) -> list[PromptToken]:
    """Each of ``following`` (n ids) with its log-probability by the (n, vocabulary) logits before it.

    Raises:
        BadLogits: a row's logits are not numbers.
    """
    if not following:
        return []
    logits = logits.cpu()
    summary = summarize(logits, True, kernels.get())
    if not all(map(math.isfinite, summary.largest)):
        raise not_numbers()
    log_totals = summary.log_totals or []
    own = logits.gather(1, torch.tensor(following)[:, None])[:, 0].tolist()
    return [
        PromptToken(id_, logprob_of(logit, log_total), most_probable(row, log_total, top_n) if top_n else ())
        for id_, logit, log_total, row in zip(following, own, log_totals, logits, strict=True)
    ]


def most_probable(logits: Tensor, log_total: float, count: int) -> tuple[TokenLogprob, ...]:
    """The ``count`` most probable tokens with their log-probabilities under the model's own distribution."""
    values, ids = logits.topk(min(count, len(logits)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(TokenLogprob(id_, logprob_of(value, log_total)) for id_, value in pairs)


def logprob_of(logit: float, log_total: float) -> float:
    return max(min(logit - log_total, 0.0), MIN_LOGPROB)
