"""The divergence of two models' distributions per token, aggregated in constant memory."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from loaders.quality.errors import QualityError

BLOCK = 64  # tokens
_CHUNK = 2**17  # logits that a thread converts to float64 at a time: 1 MB, which fit a core's cache
_CHUNK_ON_A_DEVICE = 2**24


@dataclass(frozen=True)
class TokenFigures:
    """Figures per scored token, (n,) float64 on the host.

    Args:
        reference_nll, nll: −ln p of the true token, in nats.
        kl: Σ p ln(p / q) over the vocabulary, in nats; p is the reference's distribution, q the other's.
        agrees: 1 if both have the same most probable token, else 0.
        delta_p: q − p of the true token.
    """

    reference_nll: Tensor
    nll: Tensor
    kl: Tensor
    agrees: Tensor
    delta_p: Tensor

    @classmethod
    def joined(cls, parts: Iterable["TokenFigures"]) -> "TokenFigures":
        return cls(*map(torch.cat, zip(*(part._columns() for part in parts), strict=True)))

    def split(self, sizes: Sequence[int]) -> "Iterator[TokenFigures]":
        """Parts of ``sizes`` tokens."""
        parts = zip(*(column.split(sizes) for column in self._columns()), strict=True)
        return (TokenFigures(*part) for part in parts)

    def _columns(self) -> list[Tensor]:
        return [getattr(self, one.name) for one in fields(self)]


def compare(reference: Tensor, other: Tensor, targets: Tensor) -> TokenFigures:
    """Compares (n, vocabulary) logits of two models, given the n ids that follow.

    In float64: the divergence of nearly equal distributions is a difference of nearly equal numbers.
    """
    most = _CHUNK_ON_A_DEVICE if reference.is_cuda else _CHUNK * torch.get_num_threads()
    rows = max(1, most // reference.shape[1])
    targets, other = targets.to(reference.device), other.to(reference.device)
    chunks = zip(reference.split(rows), other.split(rows), targets.split(rows), strict=True)
    columns = zip(*(_compare_chunk(*chunk) for chunk in chunks), strict=True)
    return TokenFigures(*(torch.cat(column).cpu() for column in columns))


def _compare_chunk(reference: Tensor, other: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    true_p, true_q = (log.gather(1, targets[:, None])[:, 0] for log in (log_p, log_q))
    p = log_p.exp()
    # p ln(p / q) is 0 if p is, for any q
    kl = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum(-1).clamp_min_(0.0)
    agrees = (reference.argmax(-1) == other.argmax(-1)).double()
    return -true_p, -true_q, kl, agrees, true_q.exp() - true_p.exp()


def exponential(mean: float) -> float:
    """e to a mean −ln p: a perplexity; to a mean difference: a ratio of two.

    Raises:
        QualityError: it overflows float64.
    """
    try:
        return math.exp(mean)
    except OverflowError:
        raise QualityError(f"a mean of {mean:.0f} nats a token has no finite perplexity") from None


class Mean:
    """Mean of a stream of values, and its standard error from blocks of ``BLOCK`` successive values.

    Values of successive tokens are correlated: treated as independent, they gave an error a fifth too small
        on real text. So it is the error of a mean over clusters (Cochran 1977, §9A: a ratio estimate): √(Σ
        (block sum − block length · mean)² · blocks / (blocks − 1)) / count.
    """

    def __init__(self) -> None:
        self.count, self._total = 0, 0.0
        self._blocks, self._sums_squared, self._sums_by_lengths, self._lengths_squared = 0, 0.0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """(n,) float64; blocks don't span calls."""
        blocks = values.split(BLOCK)
        sums = torch.stack([block.sum() for block in blocks])
        lengths = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
        self.count += len(values)
        self._total += float(sums.sum())
        self._blocks += len(blocks)
        self._sums_squared += float(sums @ sums)
        self._sums_by_lengths += float(sums @ lengths)
        self._lengths_squared += float(lengths @ lengths)

    @property
    def mean(self) -> float:
        return self._total / self.count

    @property
    def standard_error(self) -> float | None:
        """None for fewer than two blocks."""
        if self._blocks < 2:
            return None
        mean = self.mean
        spread = self._sums_squared - 2 * mean * self._sums_by_lengths + mean * mean * self._lengths_squared
        return math.sqrt(max(spread, 0.0) * self._blocks / (self._blocks - 1)) / self.count


class Quantiles:
    """Quantiles of a stream of values ≥ 0 to within 0.25 %, from a histogram with bins that grow by 0.5 %.

    Values below 1e-12 count as 0.
    """

    _LEAST, _GROWTH = 1e-12, math.log(1.005)

    def __init__(self) -> None:
        self._counts = torch.zeros(2 + int(math.log(1e4 / self._LEAST) / self._GROWTH), dtype=torch.int64)
        self.largest = 0.0

    def add(self, values: Tensor) -> None:
        bins = 1 + ((values / self._LEAST).log() / self._GROWTH).floor()
        bins = bins.clamp(0, len(self._counts) - 1).long()
        self._counts += torch.bincount(bins, minlength=len(self._counts))
        self.largest = max(self.largest, float(values.max()))

    def at(self, share: float) -> float:
        """The value that ``share`` of all values do not exceed."""
        cumulative = self._counts.cumsum(0)
        rank = max(1, math.ceil(share * int(cumulative[-1])))
        found = int(torch.searchsorted(cumulative, torch.tensor(rank)))
        if not found:
            return 0.0
        return min(self._LEAST * math.exp((found - 0.5) * self._GROWTH), self.largest)
