"""Counters and histograms for Prometheus, and windows of the latest values for ``/stats``."""

import statistics
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import Metric

from loaders.kv_cache.block_pool import PoolStats
from server.engine.sequence import StepStats
from server.observability.ended import Ended, SpanIds
from server.observability.latency import Latency
from server.observability.record import Record

_NATS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10)
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 0.999, 1)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
# a creation time for every series would double their number without use here
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """One per model, with a registry of its own. Event loop only.

    Args:
        model: its name, the label of every series beside the precision.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._registry = CollectorRegistry()
        self.refresh: Callable[[], None] = lambda: None
        """Sets the gauges; called before every collection."""
        self._records: dict[str, Record] = defaultdict(Record)
        label = ["model", "precision"]

        def counter(name: str, text: str, labels: Sequence[str] = label) -> Counter:
            return Counter(f"bitdial_{name}", text, labels, registry=self._registry)

        def gauge(name: str, text: str, labels: Sequence[str] = label) -> Gauge:
            return Gauge(f"bitdial_{name}", text, labels, registry=self._registry)

        self._requests = counter("requests", "Requests ended, by outcome", ["model", "precision", "outcome"])
        self._outcomes: dict[tuple[str, str], Counter] = {}  # the library's lookup takes a lock
        self._generated = counter("generated_tokens", "Tokens generated")
        self._prompt = counter("prompt_tokens", "Prompt tokens computed")
        self._latency = Latency(model)
        self._registry.register(self._latency)
        self._running = gauge("requests_running", "Sequences that hold a slot")
        self._waiting = gauge("requests_waiting", "Sequences that wait for a slot")
        self._memory = gauge(
            "memory_bytes", "Bytes counted from live tensors", ["model", "precision", "kind"]
        )
        self._usage = gauge("kv_cache_usage", "Share of the cache's blocks that running sequences use")
        self._totals = {
            "queries": counter("prefix_cache_queries", "Prompt tokens looked for in the cache"),
            "hits": counter("prefix_cache_hits", "Prompt tokens found in the cache"),
            "preemptions": counter("preemptions", "Sequences preempted for lack of blocks"),
        }
        self._last_totals: dict[str, Counts[str]] = defaultdict(Counts)
        self._load = gauge("load_seconds", "Seconds that loading took")
        outcomes = ["model", "precision", "outcome"]
        self._shadowed = counter("shadow_requests", "Requests chosen for a replay, by outcome", outcomes)
        self._drift = Histogram(
            "bitdial_shadow_kl",
            "KL divergence from the reference at a generated token, nats",
            label,
            buckets=_NATS,
            registry=self._registry,
        )
        self._agreement = Histogram(
            "bitdial_shadow_agreement",
            "Share of a request's tokens at which the reference finds the same one the most probable",
            label,
            buckets=_SHARES,
            registry=self._registry,
        )
        self._batch = Histogram(
            "bitdial_batch_size", "Rows decoded together", label, buckets=_BATCHES, registry=self._registry
        )

    def observe_step(self, precision: str, step: StepStats) -> None:
        record = self._records[precision]
        record.busy += step.seconds
        record.tokens += step.generated_tokens
        record.gaps.extend(step.gaps)
        if step.batch == 1 and not step.prompt_tokens:
            record.single_row_gaps.extend(step.gaps)
        self._generated.labels(self.model, precision).inc(step.generated_tokens)
        self._prompt.labels(self.model, precision).inc(step.prompt_tokens)
        self._latency.observe_gaps(precision, step.gaps)
        if step.batch:
            self._batch.labels(self.model, precision).observe(step.batch)

    def observe_request(self, ended: Ended, span: SpanIds | None = None) -> None:
        precision, outcome, timeline = ended.precision, ended.outcome, ended.timeline
        counter = self._outcomes.get((precision, outcome))
        if counter is None:
            counter = self._outcomes[precision, outcome] = self._requests.labels(
                self.model, precision, outcome
            )
        counter.inc()
        self._latency.observe_request(ended, span)
        if outcome != "success" or timeline.first_token is None:
            return
        record = self._records[precision]
        record.requests += 1
        record.queue.append(timeline.queue_seconds)
        record.first_token.append(timeline.first_token - timeline.arrived)
        record.total.append(timeline.total_seconds)

    def observe_shadow(self, precision: str, outcome: str) -> None:
        self._shadowed.labels(self.model, precision, outcome).inc()

    def observe_drift(self, precision: str, kl: Sequence[float], agreement: float) -> None:
        """Records a replayed request: each token's divergence, and the share of equal top tokens."""
        histogram = self._drift.labels(self.model, precision)
        for value in kl:
            histogram.observe(value)
        self._agreement.labels(self.model, precision).observe(agreement)

    def set_loaded(self, precision: str, memory: Mapping[str, int], load_seconds: float) -> None:
        """Sets bytes by kind, zeros after unloading, and the load time."""
        for kind, size in memory.items():
            self._memory.labels(self.model, precision, kind).set(size)
        self._load.labels(self.model, precision).set(load_seconds)
        self._last_totals.pop(precision, None)  # the next one counts from 0

    def set_load(self, precision: str, running: int, waiting: int) -> None:
        self._running.labels(self.model, precision).set(running)
        self._waiting.labels(self.model, precision).set(waiting)

    def set_kv_cache(self, precision: str, pool: PoolStats, preemptions: int, size: int) -> None:
        """Sets the state of a cache in blocks; ``size`` is its memory in bytes."""
        self._usage.labels(self.model, precision).set(pool.used / pool.blocks)
        self._memory.labels(self.model, precision, "kv_cache").set(size)
        totals = {"queries": pool.queried_tokens, "hits": pool.hit_tokens, "preemptions": preemptions}
        for name, total in totals.items():
            counter = self._totals[name].labels(self.model, precision)
            counter.inc(total - self._last_totals[precision][name])
            self._last_totals[precision][name] = total

    def records(self) -> dict[str, Record]:
        """The latest values of each precision."""
        return dict(self._records)

    def absorb(self, records: Mapping[str, Record]) -> None:
        """Adds another process's values to those behind ``latency`` and ``throughput``."""
        for precision, record in records.items():
            self._records[precision].absorb(record)

    def latency(self, precision: str) -> dict[str, object]:
        """Requests that succeeded, and percentiles (ms) over the latest of them."""
        record = self._records[precision]
        return {
            "requests": record.requests,
            "queue_ms": _percentiles(record.queue),
            "ttft_ms": _percentiles(record.first_token),
            "inter_token_ms": _percentiles(record.gaps),
            "total_ms": _percentiles(record.total),
        }

    def throughput(self, precision: str) -> dict[str, object]:
        """Tokens generated, and tokens per second of computing time (None before the first)."""
        record = self._records[precision]
        rate = record.tokens / record.busy if record.busy and record.tokens else None
        return {"generated_tokens": record.tokens, "tokens_per_second": rate}

    def single_row_quartiles(self, precision: str) -> tuple[float, float, float] | None:
        """Quartiles of the seconds between tokens in steps of a single row; None for fewer than eight."""
        gaps = self._records[precision].single_row_gaps
        if len(gaps) < 8:
            return None
        low, middle, high = statistics.quantiles(gaps, n=4, method="inclusive")
        return low, middle, high

    def families(self) -> Iterator[Metric]:
        """What ``/metrics`` has."""
        self.refresh()
        return iter(self._registry.collect())

    def conventional(self) -> Iterator[Metric]:
        """The histograms of OpenTelemetry's conventions."""
        return self._latency.conventional()


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Nearest-rank p50, p90, p99 and the mean, in milliseconds."""
    if not values:
        return dict.fromkeys(("p50", "p90", "p99", "mean"))
    ordered = sorted(values)
    ranks = {f"p{q}": ordered[max(0, -(-len(ordered) * q // 100) - 1)] for q in (50, 90, 99)}
    found = {**ranks, "mean": statistics.fmean(ordered)}
    return {name: round(value * 1000, 3) for name, value in found.items()}
