"""A plan as a table, as sentences and as data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from server.planning.host_size import HostSize
from server.planning.planner import Choice, Impossible
from server.planning.workload import MILLISECONDS, Frontend, Latencies, Objectives, Workload
from server.tables import NONE, cells
from server.version import VERSION

_NOISY = 2.0
_DRIFTS = 1.1
LEGEND = """\
batch       MAX_BATCH_SIZE: sequences decoded together by a replica
replicas    of this host, behind a router that chooses at random; with least-loaded routing it is less loaded
load        requests ÷ what the replicas serve at most
memory      of a replica: weights, and keys and values of full slots
hosts       like this one that the replicas need, by memory and by cores
TTFT        time to first token, ITL: between tokens; simulated, the 99th percentile by formulas in brackets
quality     perplexity ÷ fp32's, of the stored report"""


@dataclass(frozen=True)
class Document:
    """Plans of several precisions for one workload.

    Args:
        size: of this host; no choice's replica is larger.
        price_per_hour: of one replica; None: no costs.
        quality: perplexity ÷ fp32's by precision, where it is known.
    """

    model: str
    host: Mapping[str, Any]
    workload: Workload
    objectives: Objectives
    frontend: Frontend
    plans: Sequence[Choice | Impossible]
    failed: Mapping[str, str]
    quality: Mapping[str, float]
    size: HostSize
    price_per_hour: float | None = None
    noise: Mapping[str, float] = field(default_factory=dict)
    """By precision, the 99th percentile of a pass's time ÷ its median."""
    drift: Mapping[str, float] = field(default_factory=dict)
    """By precision, how far this host's speed changed meanwhile: the slowest round ÷ the fastest."""

    @property
    def choices(self) -> list[Choice]:
        """Those that meet the objectives: the fewest replicas first, then the least memory."""
        found = [plan for plan in self.plans if isinstance(plan, Choice)]
        return sorted(found, key=lambda one: (one.replicas, one.replicas * one.memory_bytes))

    def cells(self) -> list[list[str]]:
        """The headings, then a row for each choice."""
        columns = [
            ("precision", lambda one: one.precision),
            ("batch", lambda one: str(one.slots)),
            ("replicas", lambda one: str(one.replicas)),
            ("load", lambda one: f"{one.load:.0%}"),
            ("memory MB", lambda one: f"{one.memory_bytes / 1e6:.0f}"),
            ("hosts", lambda one: str(self._hosts(one))),
            ("TTFT p50 ms", lambda one: _ms(one.simulated.ttft_p50)),
            ("TTFT p99 ms", lambda one: _both(one.simulated.ttft_p99, one.formulas.ttft_p99)),
            ("ITL p50 ms", lambda one: _ms(one.simulated.itl_p50)),
            ("ITL p99 ms", lambda one: _both(one.simulated.itl_p99, one.formulas.itl_p99)),
            ("quality", lambda one: _quality(self.quality.get(one.precision))),
        ]
        if self.price_per_hour is not None:
            columns.append(("per M tokens", lambda one: f"{self._cost(one):.4g}"))
        return cells(columns, self.choices)

    def sentences(self) -> list[str]:
        """What to run, and why others can't."""
        found = [f"{name} could not be measured: {reason}." for name, reason in self.failed.items()]
        if noisy := [name for name, ratio in self.noise.items() if ratio > _NOISY]:
            were = "was" if len(noisy) == 1 else "were"
            worst = max(self.noise[name] for name in noisy)
            found.append(
                f"While {', '.join(noisy)} {were} measured, other work disturbed this host: one pass in a "
                f"hundred took {worst:.1f} × the median or longer. Measure again, with --fresh, while "
                "nothing else runs."
            )
        if drifting := [name for name, ratio in self.drift.items() if ratio > _DRIFTS]:
            worst = max(self.drift[name] for name in drifting) - 1
            found.append(
                f"While {', '.join(drifting)} ran, this host's speed changed by {worst:.0%} within minutes: "
                "the latencies are no more exact than that, and less near the capacity."
            )
        for plan in self.plans:
            if isinstance(plan, Impossible):
                idle = f"{_ms(plan.idle.ttft_p99)} ms and {_ms(plan.idle.itl_p99)} ms with almost no load"
                found.append(f"{plan.precision} can't meet the objectives: {plan.reason} (p99 {idle}).")
        if not self.choices:
            return [*found, "No precision meets the objectives on this host."]
        best = self.choices[0]
        count = "one replica" if best.replicas == 1 else f"{best.replicas} replicas"
        found.append(
            f"Fewest replicas: {best.precision} with MAX_BATCH_SIZE={best.slots}, {count} of "
            f"{best.memory_bytes / 1e6:.0f} MB; what quality it costs, bitdial report measures."
        )
        found.extend(self._too_large())
        return found

    def _too_large(self) -> Iterator[str]:
        """Which plans this host alone has no memory for."""
        large = [one for one in self.choices if one.all_bytes > self.size.memory_bytes]
        if large:
            sums = ", ".join(
                f"{one.precision} {one.all_bytes / 1e6:.0f} MB ({self._hosts(one)} hosts)" for one in large
            )
            yield (
                f"All replicas together don't fit this host, which has {self.size.memory_bytes / 1e6:.0f} MB "
                f"for them: {sums}."
            )

    def _hosts(self, one: Choice) -> int:
        return self.size.hosts(one.replicas, one.memory_bytes)

    def data(self) -> dict[str, Any]:
        return {
            "bitdial": VERSION,
            "model": self.model,
            "host": dict(self.host),
            "host_size": asdict(self.size),
            "workload": asdict(self.workload),
            "objectives": asdict(self.objectives),
            "frontend": asdict(self.frontend),
            "price_per_hour": self.price_per_hour,
            "choices": [self._choice(one) for one in self.choices],
            "impossible": [_impossible(one) for one in self.plans if isinstance(one, Impossible)],
            "failed": dict(self.failed),
            "noise_p99": dict(self.noise),
            "drift": dict(self.drift),
        }

    def _choice(self, one: Choice) -> dict[str, Any]:
        return {
            **asdict(one),
            "load": one.load,
            "all_replicas_bytes": one.all_bytes,
            "fits_this_host": self._hosts(one) == 1,
            "hosts": self._hosts(one),
            "formulas": milliseconds(one.formulas),
            "simulated": milliseconds(one.simulated),
            "perplexity_ratio": self.quality.get(one.precision),
            "cost_per_million_tokens": None if self.price_per_hour is None else self._cost(one),
        }

    def _cost(self, one: Choice) -> float:
        assert self.price_per_hour is not None
        return one.cost_per_million_tokens(self.price_per_hour, self.workload.tokens)


def milliseconds(latencies: Latencies) -> dict[str, float]:
    """Figures with their unit in the name."""
    names = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    found = {f"{name}_ms": round(MILLISECONDS * getattr(latencies, name), 3) for name in names}
    return {**found, "refused": latencies.refused, "rows": round(latencies.rows, 3)}


def _impossible(one: Impossible) -> dict[str, Any]:
    return {"precision": one.precision, "reason": one.reason, "idle": milliseconds(one.idle)}


def _ms(seconds: float) -> str:
    return f"{seconds * MILLISECONDS:.3g}" if seconds < 1 else f"{seconds * MILLISECONDS:.0f}"


def _both(simulated: float, formulas: float) -> str:
    return f"{_ms(simulated)} ({_ms(formulas)})"


def _quality(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.3f}"
