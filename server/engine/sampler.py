"""Logits → tokens. Each row by its own parameters and random stream: other rows of the batch have no effect.

Order of operations, as in ``transformers`` and TGI: penalties and bias, temperature, top-k, top-p,
typical-p, min-p, then one draw by inversion of the cumulative distribution.
"""

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Rows
from functools import partial

import torch
from torch import Tensor

from loaders import kernels
from loaders.kernels import Summary, summarize
from server.engine.device_sampler import DeviceTokens, sample_on_device
from server.engine.faults import BadLogits, run_isolated
from server.engine.logprobs import logprob_of, most_probable, not_numbers, with_logprobs
from server.engine.sequence import (
    MIN_TEMPERATURE,
    FinishReason,
    Sequence,
    Token,
)


class PendingTokens:
    """Tokens that an accelerator samples while the host does other work.

    Args:
        ids: (rows,) int64, on the device, from which the next step can start; None if the rows could not be
            sampled together.
        wait: returns one token a row, or the row's error.
    """

    def __init__(self, ids: Tensor | None, wait: Callable[[], list[Token | Exception]]) -> None:
        self.ids, self.wait = ids, wait


class Sampler:
    """Samples the next token of each row.

    Args:
        eos_ids: tokens that end a sequence (unless it ignores them).
    """

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> list[Token | Exception]:
        """One token a row from (rows, vocabulary) float32 logits, or the row's error."""
        if logits.is_cuda:
            return self.launch(logits, sequences).wait()
        with_logprobs = any(sequence.params.reports for sequence in sequences)
        summary = summarize(logits, with_logprobs, kernels.get())
        tokens: list[Token | Exception] = []
        for row, sequence in enumerate(sequences):
            try:
                tokens.append(self._token(summary, logits, row, sequence))
            except Exception as error:
                tokens.append(error)
        return tokens

    def _token(self, summary: Summary, logits: Tensor, row: int, sequence: Sequence) -> Token:
        """The token of one row, with few calls into torch: the overhead of each exceeds its work."""
        id_, logit = summary.ids[row], summary.largest[row]
        if not math.isfinite(logit):
            raise not_numbers()
        if not sequence.params.is_plain:
            id_ = _sample(logits[row], sequence)
            logit = float(logits[row, id_])
        finish = self._finish_reason(id_, sequence)
        if summary.log_totals is None or not sequence.params.reports:
            return Token(id_, None, (), finish)
        log_total = summary.log_totals[row]
        top = most_probable(logits[row], log_total, sequence.params.top_n) if sequence.params.top_n else ()
        return Token(id_, logprob_of(logit, log_total), top, finish)

    def launch(self, logits: Tensor, sequences: Rows[Sequence]) -> PendingTokens:
        """As ``sample``, all rows together on the device of the logits; raises nothing."""
        # drawn once: rows that are sampled again alone use the same numbers
        uniforms = [s.random.random() if s.params.do_sample else 0.0 for s in sequences]
        sampled, _ = run_isolated(partial(sample_on_device, logits, sequences, uniforms))
        if sampled is not None:
            return PendingTokens(sampled.ids, partial(self._received, sampled, list(sequences)))
        alone = [self._sample_alone(logits[row], one, uniforms[row]) for row, one in enumerate(sequences)]
        return PendingTokens(None, lambda: alone)

    def _sample_alone(self, logits: Tensor, sequence: Sequence, uniform: float) -> Token | Exception:
        """For rows that could not be sampled together, mostly for lack of memory."""
        sampled, error = run_isolated(partial(sample_on_device, logits[None], [sequence], [uniform]))
        if sampled is None:
            return error or BadLogits("no token could be picked")
        return self._received(sampled, [sequence])[0]

    def _received(self, sampled: DeviceTokens, sequences: Rows[Sequence]) -> list[Token | Exception]:
        ids, highest, *logprobs = sampled.wait()
        tokens: list[Token | Exception] = [
            Token(id_, None, (), self._finish_reason(id_, sequence))
            if math.isfinite(logit)
            else not_numbers()
            for id_, logit, sequence in zip(map(int, ids), highest, sequences, strict=True)
        ]
        if not logprobs:
            return tokens
        return [with_logprobs(*row) for row in zip(tokens, sequences, *logprobs, strict=True)]

    def _finish_reason(self, id_: int, sequence: Sequence) -> FinishReason | None:
        if id_ in self._eos_ids and not sequence.params.ignore_eos:
            return "eos_token"
        if id_ in sequence.params.stop_ids:
            return "stop_sequence"
        return "length" if len(sequence.generated) + 1 >= sequence.params.max_new_tokens else None


def distribution(logits: Tensor, sequence: Sequence) -> Tensor:
    """The (vocabulary,) probabilities that a sampling row draws from, float64, summing to 1."""
    params = sequence.params
    scores = _adjust(logits, sequence)
    scores = (scores - scores.max()) / max(params.temperature, MIN_TEMPERATURE)
    if params.top_k is not None and params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    weights = scores.exp()
    if params.top_p is not None:
        weights = _top_p(weights, params.top_p)
    if params.typical_p is not None:
        weights = _typical_p(weights, params.typical_p)
    if params.min_p:
        weights = weights.masked_fill(weights < params.min_p * weights.max(), 0.0)
    probabilities = weights.double()
    return probabilities / probabilities.sum()


def _sample(logits: Tensor, sequence: Sequence) -> int:
    if not sequence.params.do_sample:
        return int(_adjust(logits, sequence).argmax())
    cumulative = distribution(logits, sequence).cumsum(0)
    point = sequence.random.random() * float(cumulative[-1])
    # right=True: the first token whose cumulative mass exceeds the point, never one of zero mass
    index = int(torch.searchsorted(cumulative, torch.tensor(point, dtype=cumulative.dtype), right=True))
    return min(index, int(cumulative.argmax()))  # a point rounded up to the total takes the last real token


def _adjust(logits: Tensor, sequence: Sequence) -> Tensor:
    """The row with penalties and bias applied, withheld tokens excluded; a copy where there are any.

    The repetition penalty (Keskar et al. 2019) counts prompt and continuation, the frequency and presence
    penalties (OpenAI's definition) the continuation alone.
    """
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt, *sequence.generated}))
        values = logits[seen]
        factor = params.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(values > 0, values / factor, values * factor))
    if (params.frequency_penalty or params.presence_penalty) and sequence.generated:
        counts = Counter(sequence.generated)
        ids = torch.tensor(list(counts))
        weights = torch.tensor(list(counts.values()), dtype=logits.dtype)
        penalty = params.frequency_penalty * weights + params.presence_penalty
        logits = logits.index_add(0, ids, -penalty)
    if params.logit_bias:
        ids, biases = _bias(sequence)
        logits = logits.index_add(0, ids, biases.to(logits.dtype))
    if sequence.withheld:
        logits = logits.index_fill(0, torch.tensor(sequence.withheld), -torch.inf)
    return logits


def _bias(sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Ids and biases as tensors, made once: every token of the vocabulary may have a bias."""
    if sequence.bias is None:
        ids, biases = zip(*sequence.params.logit_bias, strict=True)
        sequence.bias = torch.tensor(ids), torch.tensor(biases)
    tensors: tuple[Tensor, Tensor] = sequence.bias
    return tensors


def _top_p(weights: Tensor, top_p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2020): the fewest tokens whose mass reaches ``top_p``; at least one."""
    limit = top_p * float(weights.sum(dtype=torch.float64))
    count = min(64, len(weights))
    while True:  # the nucleus is mostly small: sorting the whole vocabulary would cost more than the model
        values, ids = weights.topk(count)
        mass = values.double().cumsum(0)
        if float(mass[-1]) >= limit or count == len(weights):
            break
        count = min(count * 8, len(weights))
    kept = int((mass < limit).sum()) + 1
    return torch.zeros_like(weights).index_copy(0, ids[:kept], values[:kept])


def _typical_p(weights: Tensor, typical_p: float) -> Tensor:
    """Locally typical sampling (Meister et al. 2023): surprisals nearest to the entropy first."""
    probabilities = weights.double() / weights.sum(dtype=torch.float64)
    surprisal = -probabilities.log()
    entropy = (probabilities * surprisal).nan_to_num(0.0).sum()
    order = (surprisal - entropy).abs().argsort(stable=True)
    mass = probabilities[order].cumsum(0)
    kept = order[: int((mass < typical_p).sum()) + 1]
    return torch.zeros_like(weights).index_copy(0, kept, weights[kept])
