"""An n-gram language model, the baseline of the bundled model."""

import math
from collections import Counter, defaultdict


class KneserNey:
    """Interpolated Kneser-Ney n-gram model (Chen & Goodman 1999, eq. 4.2)."""

    def __init__(self, ids: list[int], order: int, vocabulary: int, discount: float = 0.75) -> None:
        self.order, self.vocabulary, self.discount = order, vocabulary, discount
        # counts[n][context of n tokens][token]; below the highest order, counts of distinct left contexts
        self.counts: list[dict[tuple[int, ...], Counter[int]]] = []
        for n in range(order):
            table: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
            if n == order - 1:
                for gram in zip(*(ids[i:] for i in range(order)), strict=False):
                    table[gram[:-1]][gram[-1]] += 1
            else:
                for gram in set(zip(*(ids[i:] for i in range(n + 2)), strict=False)):
                    table[gram[1:-1]][gram[-1]] += 1
            self.counts.append(table)
        self.totals = [{c: sum(t.values()) for c, t in table.items()} for table in self.counts]

    def probability(self, context: tuple[int, ...], token: int) -> float:
        p = 1.0 / self.vocabulary
        for n in range(self.order):
            key = context[len(context) - n :]
            if (seen := self.counts[n].get(key)) is None:
                continue
            total = self.totals[n][key]
            p = (max(seen[token] - self.discount, 0.0) + self.discount * len(seen) * p) / total
        return p

    def nats(self, ids: list[int]) -> float:
        width = self.order - 1
        return -sum(
            math.log(self.probability(tuple(ids[max(0, i - width) : i]), ids[i])) for i in range(1, len(ids))
        )
