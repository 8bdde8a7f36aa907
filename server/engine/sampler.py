"""Logits → tokens. Every row by its own parameters and random stream, untouched by its batch-mates.

Order of the steps, as ``transformers`` and TGI have it: penalties and bias, temperature, top-k, top-p,
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
from server.engine.device_sampler import Choice, choose
from server.engine.faults import BadLogits, run_isolated
from server.engine.sequence import (
    COLDEST,
    LEAST_LOGPROB,
    FinishReason,
    PromptToken,
    Sequence,
    Token,
    TokenLogprob,
)


class PendingTokens:
    """Tokens that are being picked; on an accelerator the host can do other things until it needs them.

    Args:
        ids: (rows,) int64, on the device, where the next step can start from them; None if there are none.
        wait: one token a row, or the error of that row.
    """

    def __init__(self, ids: Tensor | None, wait: Callable[[], list[Token | Exception]]) -> None:
        self.ids, self.wait = ids, wait


class Sampler:
    """Picks the next token of each row.

    Args:
        eos_ids: tokens that end a sequence (unless it ignores them).
    """

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids

    def pick(self, logits: Tensor, sequences: Rows[Sequence]) -> list[Token | Exception]:
        """One token a row from (rows, vocabulary) float32 logits; an error in one row stays in its place."""
        if logits.is_cuda:
            return self.begin(logits, sequences).wait()
        told = any(sequence.params.reports for sequence in sequences)
        summary = summarize(logits, told, kernels.get())
        picked: list[Token | Exception] = []
        for row, sequence in enumerate(sequences):
            try:
                picked.append(self._from(summary, logits, row, sequence))
            except Exception as error:
                picked.append(error)
        return picked

    def _from(self, summary: Summary, logits: Tensor, row: int, sequence: Sequence) -> Token:
        """The token of one row, by as few calls into torch as there can be: each costs more than it does."""
        chosen, logit = summary.ids[row], summary.largest[row]
        if not math.isfinite(logit):
            raise _no_numbers()
        if not sequence.params.is_plain:
            chosen = _choose(logits[row], sequence)
            logit = float(logits[row, chosen])
        finish = self._finish(chosen, sequence)
        if summary.log_totals is None or not sequence.params.reports:
            return Token(chosen, None, (), finish)
        log_total = summary.log_totals[row]
        top = _top(logits[row], log_total, sequence.params.top_n) if sequence.params.top_n else ()
        return Token(chosen, _logprob(logit, log_total), top, finish)

    def begin(self, logits: Tensor, sequences: Rows[Sequence]) -> PendingTokens:
        """As ``pick``, all rows together where the logits are; raises nothing."""
        # drawn once: rows that are tried again alone go on with the same numbers
        points = [s.random.random() if s.params.do_sample else 0.0 for s in sequences]
        choice, _ = run_isolated(partial(choose, logits, sequences, points))
        if choice is not None:
            return PendingTokens(choice.ids, partial(self._arrived, choice, list(sequences)))
        alone = [self._alone(logits[row], one, points[row]) for row, one in enumerate(sequences)]
        return PendingTokens(None, lambda: alone)

    def _alone(self, logits: Tensor, sequence: Sequence, point: float) -> Token | Exception:
        """Where all rows together could not be computed, for lack of memory as a rule."""
        choice, fault = run_isolated(partial(choose, logits[None], [sequence], [point]))
        if choice is None:
            return fault or BadLogits("no token could be picked")
        return self._arrived(choice, [sequence])[0]

    def _arrived(self, choice: Choice, sequences: Rows[Sequence]) -> list[Token | Exception]:
        ids, highest, *told = choice.wait()
        picked: list[Token | Exception] = [
            Token(id_, None, (), self._finish(id_, sequence)) if math.isfinite(logit) else _no_numbers()
            for id_, logit, sequence in zip(map(int, ids), highest, sequences, strict=True)
        ]
        return [_reported(*row) for row in zip(picked, sequences, *told, strict=True)] if told else picked

    def _finish(self, chosen: int, sequence: Sequence) -> FinishReason | None:
        if chosen in self._eos_ids and not sequence.params.ignore_eos:
            return "eos_token"
        if chosen in sequence.params.stop_ids:
            return "stop_sequence"
        return "length" if len(sequence.generated) + 1 >= sequence.params.max_new_tokens else None


def _no_numbers() -> BadLogits:
    return BadLogits("the model returned logits that are not numbers")


def _reported(
    token: Token | Exception, sequence: Sequence, logprob: float, *alternatives: float
) -> Token | Exception:
    """With the log-probabilities that are told of it; ``alternatives``: n ids, then their n."""
    if isinstance(token, Exception) or not sequence.params.reports:
        return token
    half = len(alternatives) // 2
    pairs = zip(map(int, alternatives[:half]), alternatives[half:], strict=True)
    top = tuple(TokenLogprob(*pair) for pair in pairs)[: sequence.params.top_n]
    return token._replace(logprob=logprob, top=top)


def prompt_logprobs(logits: Tensor, following: Rows[int], top_n: int) -> list[PromptToken]:
    """What the model gave each of ``following`` (n ids) by the (n, vocabulary) logits before it.

    Raises:
        BadLogits: some of them are not numbers.
    """
    if not following:
        return []
    logits = logits.cpu()
    summary = summarize(logits, True, kernels.get())
    if not all(map(math.isfinite, summary.largest)):
        raise _no_numbers()
    log_totals = summary.log_totals or []
    chosen = logits.gather(1, torch.tensor(following)[:, None])[:, 0].tolist()
    return [
        PromptToken(id_, _logprob(logit, log_total), _top(row, log_total, top_n) if top_n else ())
        for id_, logit, log_total, row in zip(following, chosen, log_totals, logits, strict=True)
    ]


def distribution(logits: Tensor, sequence: Sequence) -> Tensor:
    """The (vocabulary,) probabilities that a sampling row draws from, float64, summing to 1."""
    params = sequence.params
    scores = _adjust(logits, sequence)
    scores = (scores - scores.max()) / max(params.temperature, COLDEST)
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


def _choose(logits: Tensor, sequence: Sequence) -> int:
    if not sequence.params.do_sample:
        return int(_adjust(logits, sequence).argmax())
    cumulative = distribution(logits, sequence).cumsum(0)
    point = sequence.random.random() * float(cumulative[-1])
    # right=True: the first token whose cumulative mass exceeds the point, never one of zero mass
    index = int(torch.searchsorted(cumulative, torch.tensor(point, dtype=cumulative.dtype), right=True))
    return min(index, int(cumulative.argmax()))  # a point rounded up to the total takes the last real token


def _adjust(logits: Tensor, sequence: Sequence) -> Tensor:
    """The row with penalties and bias applied, withheld tokens excluded; a copy where there are any.

    The repetition penalty (Keskar et al. 2019) looks at prompt and continuation, the frequency and presence
    penalties (OpenAI's definition) at the continuation alone.
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
    """Ids and biases as tensors, made once: there may be one for every token of the vocabulary."""
    if sequence.bias is None:
        ids, biases = zip(*sequence.params.logit_bias, strict=True)
        sequence.bias = torch.tensor(ids), torch.tensor(biases)
    made: tuple[Tensor, Tensor] = sequence.bias
    return made


def _top_p(weights: Tensor, top_p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2020): the fewest tokens whose mass reaches ``top_p``; at least one."""
    wanted = top_p * float(weights.sum(dtype=torch.float64))
    count = min(64, len(weights))
    while True:  # the nucleus is small as a rule: sorting the whole vocabulary would cost more than the model
        values, ids = weights.topk(count)
        mass = values.double().cumsum(0)
        if float(mass[-1]) >= wanted or count == len(weights):
            break
        count = min(count * 8, len(weights))
    kept = int((mass < wanted).sum()) + 1
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


def _top(logits: Tensor, log_total: float, count: int) -> tuple[TokenLogprob, ...]:
    """The most probable tokens with their natural log-probabilities under the model's own distribution."""
    values, ids = logits.topk(min(count, len(logits)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(TokenLogprob(id_, _logprob(value, log_total)) for id_, value in pairs)


def _logprob(logit: float, log_total: float) -> float:
    return max(min(logit - log_total, 0.0), LEAST_LOGPROB)
