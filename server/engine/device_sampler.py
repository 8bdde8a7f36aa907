"""Logits → tokens where the logits lie on an accelerator: all rows together, one transfer to the host.

The steps and their order are ``server.engine.sampler``'s. The host draws each row's random number from the
row's own stream; all else is computed on the device, and the host doesn't wait for it. Sums are float64: how
a device splits a sum depends on the number of rows, and rounded to float32 it would let batch-mates move a
threshold.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loaders.cuda.pinned import send
from server.engine.sequence import COLDEST, LEAST_LOGPROB, SamplingParams
from server.engine.sequence import Sequence as Row


class Choice:
    """Tokens picked on the device; the host need not know them yet.

    Args:
        ids: (rows,), int64.
        numbers: (2 or 3 + 2 n, rows) float32: ids, largest logits and, where any row reports them,
            log-probabilities, n alternatives' ids and n log-probabilities of those. A float32 holds ids
            exactly up to 2²⁴, which is more than any vocabulary.
    """

    def __init__(self, ids: Tensor, numbers: Tensor) -> None:
        self.ids = ids
        self._arrived = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))
        else:
            self._host = numbers

    def wait(self) -> list[list[float]]:
        """The numbers. Waits for the device, and for no more of its work than this."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[list[float]] = self._host.tolist()
        return numbers


@torch.inference_mode()
def choose(logits: Tensor, rows: Sequence[Row], points: Sequence[float]) -> Choice:
    """One token a row from (rows, vocabulary) float32 logits; each by its own parameters.

    Args:
        points: in [0, 1), what each row drew from its random stream; of no meaning where it doesn't sample.
    """
    highest, ids = logits.max(dim=-1)
    chosen = [index for index, row in enumerate(rows) if not row.params.is_plain]
    if chosen:
        where = send(chosen, torch.int64, logits)
        some = logits.index_select(0, where)
        ids = ids.index_copy(0, where, _pick(some, *_these(chosen, rows, points)))
    return Choice(ids, torch.stack([ids.float(), highest, *_told(logits, ids, rows)]))


def _told(logits: Tensor, ids: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """Log-probabilities under the model's own distribution, where any row reports them."""
    told = [row.params.top_n for row in rows if row.params.reports]
    if not told:
        return []
    most = max(told)
    total = logits.logsumexp(dim=-1)
    own = logits.gather(1, ids[:, None])[:, 0] - total
    values, others = logits.topk(min(most, logits.shape[1]), dim=-1)
    probable = (values - total[:, None]).clamp(LEAST_LOGPROB, 0.0)
    return [own.clamp(LEAST_LOGPROB, 0.0), *others.float().unbind(1), *probable.unbind(1)]


def _these(indices: list[int], rows: Sequence[Row], points: Sequence[float]) -> tuple[list[Row], list[float]]:
    return [rows[index] for index in indices], [points[index] for index in indices]


def _pick(logits: Tensor, rows: Sequence[Row], points: list[float]) -> Tensor:
    scores = _adjust(logits, rows)
    greedy = scores.argmax(dim=-1)
    if not any(row.params.do_sample for row in rows):
        return greedy
    drawn = _draw(_weights(scores, rows), points)
    sampled = send([row.params.do_sample for row in rows], torch.bool, logits)
    return torch.where(sampled, drawn, greedy)


def _draw(weights: Tensor, points: list[float]) -> Tensor:
    """By inversion of the cumulative distribution: in float32 sums, tokens of a large vocabulary get lost."""
    probabilities = weights.double()
    cumulative = (probabilities / probabilities.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    total = cumulative[:, -1:]
    point = send(points, torch.float64, weights)[:, None] * total
    index = torch.searchsorted(cumulative, point, right=True)[:, 0]
    # a point rounded up to the total takes the last real token
    return torch.minimum(index, cumulative.argmax(dim=-1))


def _weights(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Unnormalized probabilities of the tokens that each row may draw; 0 for the others."""
    params = [row.params for row in rows]
    temperature = send([max(p.temperature, COLDEST) for p in params], torch.float32, scores)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None]
    weights = _top_k(scores, params).exp()
    weights = _for_some(weights, [p.top_p for p in params], _top_p)
    weights = _for_some(weights, [p.typical_p for p in params], _typical_p)
    least = send([p.min_p or 0.0 for p in params], torch.float32, scores)
    return weights.masked_fill(weights < (least * weights.amax(dim=-1))[:, None], 0.0)


def _top_k(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    size = scores.shape[1]
    counts = [min(p.top_k or size, size) for p in params]
    limited = [count for count in counts if count < size]
    if not limited:
        return scores
    best = scores.topk(max(limited), dim=-1).values
    last = send([(count if count < size else 1) - 1 for count in counts], torch.int64, scores)
    least = best.gather(1, last[:, None])
    cut = send([count < size for count in counts], torch.bool, scores)[:, None]
    return scores.masked_fill(cut & (scores < least), -torch.inf)


def _for_some(weights: Tensor, limits: list[float | None], cut: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``cut`` for the rows that have a limit: sorting a vocabulary is the dearest step of all."""
    some = [index for index, limit in enumerate(limits) if limit is not None]
    if not some:
        return weights
    where = send(some, torch.int64, weights)
    limit = send([limits[index] for index in some], torch.float64, weights)[:, None]
    return weights.index_copy(0, where, cut(weights.index_select(0, where), limit))


def _top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Nucleus (Holtzman et al. 2020): the fewest tokens whose mass reaches ``top_p``; at least one."""
    values, order = weights.sort(dim=-1, descending=True, stable=True)
    wanted = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return _first(weights, values.double().cumsum(dim=-1) < wanted, order)


def _typical_p(weights: Tensor, typical_p: Tensor) -> Tensor:
    """Locally typical sampling (Meister et al. 2023): surprisals nearest to the entropy first."""
    probabilities = weights.double() / weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    surprisal = -probabilities.log()
    entropy = (probabilities * surprisal).nan_to_num(0.0).sum(dim=-1, keepdim=True)
    order = (surprisal - entropy).abs().argsort(dim=-1, stable=True)
    return _first(weights, probabilities.gather(1, order).cumsum(dim=-1) < typical_p, order)


def _first(weights: Tensor, below: Tensor, order: Tensor) -> Tensor:
    """Keeps, of each row's tokens in that order, those below the wanted mass and the one that reaches it."""
    count = below.sum(dim=-1, keepdim=True)
    kept = torch.arange(weights.shape[1], dtype=torch.int64, device=weights.device) <= count
    return weights.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), 0.0)


def _adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalties and bias, as in ``server.engine.sampler``; a copy where there are any."""
    logits = _repetition(logits, rows)
    where: list[tuple[int, int]] = []
    change: list[float] = []
    for index, row in enumerate(rows):
        params = row.params
        if params.frequency_penalty or params.presence_penalty:
            counts = Counter(row.generated)
            where += [(index, id_) for id_ in counts]
            change += [-(params.frequency_penalty * n + params.presence_penalty) for n in counts.values()]
        where += [(index, id_) for id_, _ in params.logit_bias]
        change += [bias for _, bias in params.logit_bias]
        where += [(index, id_) for id_ in row.withheld]
        change += [-math.inf] * len(row.withheld)
    if not where:
        return logits
    places = send(list(zip(*where, strict=True)), torch.int64, logits)
    return logits.index_put((places[0], places[1]), send(change, logits.dtype, logits), accumulate=True)


def _repetition(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    where: list[tuple[int, int]] = []
    factors: list[float] = []
    for index, row in enumerate(rows):
        if row.params.repetition_penalty != 1.0:
            seen = sorted({*row.prompt, *row.generated})
            where += [(index, id_) for id_ in seen]
            factors += [row.params.repetition_penalty] * len(seen)
    if not where:
        return logits
    places, factor = (
        send(list(zip(*where, strict=True)), torch.int64, logits),
        send(factors, logits.dtype, logits),
    )
    values = logits[places[0], places[1]]
    return logits.index_put((places[0], places[1]), torch.where(values > 0, values / factor, values * factor))
