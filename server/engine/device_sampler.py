"""Logits → tokens on an accelerator: all rows together, one transfer to the host.

The order of operations is that of ``server.engine.sampler``. The host draws each row's random number from the
row's own stream; all else is computed on the device, and the host doesn't wait for it. Sums are float64: how
a device splits a sum depends on the number of rows, and in float32 the rounding would let other rows of the
batch move a threshold.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loaders.cuda.pinned import send
from server.engine.sequence import MIN_LOGPROB, MIN_TEMPERATURE, SamplingParams
from server.engine.sequence import Sequence as Row


class DeviceTokens:
    """Tokens sampled on the device, on their way to the host.

    Args:
        ids: (rows,), int64.
        numbers: (2 or 3 + 2 n, rows) float32: ids, largest logits and, where any row reports them,
            log-probabilities, n alternatives' ids and n log-probabilities of those. A float32 holds ids
            exactly up to 2²⁴, which is more than any vocabulary.
    """

    def __init__(self, ids: Tensor, numbers: Tensor) -> None:
        self.ids = ids
        self._copied = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))
        else:
            self._host = numbers

    def wait(self) -> list[list[float]]:
        """The numbers as lists. Waits for the copy, not for what was launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[list[float]] = self._host.tolist()
        return numbers


@torch.inference_mode()
def sample_on_device(logits: Tensor, rows: Sequence[Row], uniforms: Sequence[float]) -> DeviceTokens:
    """One token a row from (rows, vocabulary) float32 logits; each by its own parameters.

    Args:
        uniforms: in [0, 1), each row's draw from its random stream; ignored for rows that don't sample.
    """
    highest, ids = logits.max(dim=-1)
    adjusted = [index for index, row in enumerate(rows) if not row.params.is_plain]
    if adjusted:
        indices = send(adjusted, torch.int64, logits)
        sampled = _sample(
            logits.index_select(0, indices), [rows[i] for i in adjusted], [uniforms[i] for i in adjusted]
        )
        ids = ids.index_copy(0, indices, sampled)
    return DeviceTokens(ids, torch.stack([ids.float(), highest, *_logprobs(logits, ids, rows)]))


def _logprobs(logits: Tensor, ids: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """Log-probabilities under the model's own distribution, where any row reports them."""
    top_ns = [row.params.top_n for row in rows if row.params.reports]
    if not top_ns:
        return []
    total = logits.logsumexp(dim=-1)
    own = logits.gather(1, ids[:, None])[:, 0] - total
    values, others = logits.topk(min(max(top_ns), logits.shape[1]), dim=-1)
    top = (values - total[:, None]).clamp(MIN_LOGPROB, 0.0)
    return [own.clamp(MIN_LOGPROB, 0.0), *others.float().unbind(1), *top.unbind(1)]


def _sample(logits: Tensor, rows: Sequence[Row], uniforms: Sequence[float]) -> Tensor:
    scores = _adjust(logits, rows)
    greedy = scores.argmax(dim=-1)
    if not any(row.params.do_sample for row in rows):
        return greedy
    drawn = _draw(_weights(scores, rows), uniforms)
    sampled = send([row.params.do_sample for row in rows], torch.bool, logits)
    return torch.where(sampled, drawn, greedy)


def _draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Inverts the cumulative distribution, in float64: float32 sums lose tokens of a large vocabulary."""
    probabilities = weights.double()
    cumulative = (probabilities / probabilities.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    total = cumulative[:, -1:]
    point = send(uniforms, torch.float64, weights)[:, None] * total
    index = torch.searchsorted(cumulative, point, right=True)[:, 0]
    # a point rounded up to the total takes the last real token
    return torch.minimum(index, cumulative.argmax(dim=-1))


def _weights(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """(rows, vocabulary) unnormalized probabilities; 0 for tokens that a row may not draw."""
    params = [row.params for row in rows]
    temperature = send([max(p.temperature, MIN_TEMPERATURE) for p in params], torch.float32, scores)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None]
    weights = _top_k(scores, params).exp()
    weights = _limit_rows(weights, [p.top_p for p in params], _top_p)
    weights = _limit_rows(weights, [p.typical_p for p in params], _typical_p)
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


def _limit_rows(
    weights: Tensor, limits: list[float | None], keep: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Applies ``keep`` to the rows that have a limit: sorting a vocabulary costs more than all the rest."""
    limited = [index for index, limit in enumerate(limits) if limit is not None]
    if not limited:
        return weights
    indices = send(limited, torch.int64, weights)
    limit = send([limits[index] for index in limited], torch.float64, weights)[:, None]
    return weights.index_copy(0, indices, keep(weights.index_select(0, indices), limit))


def _top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Nucleus (Holtzman et al. 2020): the fewest tokens whose mass reaches ``top_p``; at least one."""
    values, order = weights.sort(dim=-1, descending=True, stable=True)
    mass = top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return _keep_prefix(weights, values.double().cumsum(dim=-1) < mass, order)


def _typical_p(weights: Tensor, typical_p: Tensor) -> Tensor:
    """Locally typical sampling (Meister et al. 2023): surprisals nearest to the entropy first."""
    probabilities = weights.double() / weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    surprisal = -probabilities.log()
    entropy = (probabilities * surprisal).nan_to_num(0.0).sum(dim=-1, keepdim=True)
    order = (surprisal - entropy).abs().argsort(dim=-1, stable=True)
    return _keep_prefix(weights, probabilities.gather(1, order).cumsum(dim=-1) < typical_p, order)


def _keep_prefix(weights: Tensor, below: Tensor, order: Tensor) -> Tensor:
    """Keeps, of each row's tokens in that order, those below the limit and the one that reaches it."""
    count = below.sum(dim=-1, keepdim=True)
    kept = torch.arange(weights.shape[1], dtype=torch.int64, device=weights.device) <= count
    return weights.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), 0.0)


def _adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Applies penalties and bias as ``server.engine.sampler`` does; a copy where there are any."""
    logits = _penalize_repetition(logits, rows)
    places: list[tuple[int, int]] = []
    changes: list[float] = []
    for index, row in enumerate(rows):
        params = row.params
        if params.frequency_penalty or params.presence_penalty:
            counts = Counter(row.generated)
            places += [(index, id_) for id_ in counts]
            changes += [-(params.frequency_penalty * n + params.presence_penalty) for n in counts.values()]
        places += [(index, id_) for id_, _ in params.logit_bias]
        changes += [bias for _, bias in params.logit_bias]
        places += [(index, id_) for id_ in row.withheld]
        changes += [-math.inf] * len(row.withheld)
    if not places:
        return logits
    rows_, ids = send(list(zip(*places, strict=True)), torch.int64, logits)
    return logits.index_put((rows_, ids), send(changes, logits.dtype, logits), accumulate=True)


def _penalize_repetition(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    places: list[tuple[int, int]] = []
    factors: list[float] = []
    for index, row in enumerate(rows):
        if row.params.repetition_penalty != 1.0:
            seen = sorted({*row.prompt, *row.generated})
            places += [(index, id_) for id_ in seen]
            factors += [row.params.repetition_penalty] * len(seen)
    if not places:
        return logits
    rows_, ids = send(list(zip(*places, strict=True)), torch.int64, logits)
    factor = send(factors, logits.dtype, logits)
    values = logits[rows_, ids]
    return logits.index_put((rows_, ids), torch.where(values > 0, values / factor, values * factor))
