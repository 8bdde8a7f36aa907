"""Latencies of requests and tokens, as bitdial's histograms and as those of OpenTelemetry's conventions.

Both are read from the same counts. The conventions: "Generative AI model server metrics", v0.1.0, in
https://github.com/open-telemetry/semantic-conventions-genai
"""

from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.observability.durations import Durations, Labels
from server.observability.ended import Ended, SpanIds

PROVIDER = "bitdial"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# the bounds that the conventions name
_REQUEST = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_OWN_LABELS = ("model", "precision")
GEN_AI_LABELS = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "gen_ai_response_model",
    "bitdial_precision",
    "error_type",
)


class Latency(Collector):
    """Every duration that requests are counted by. Event loop only.

    Args:
        model: the served model's name.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        # labels: precision, operation, error's type or ""
        self._request = Durations(SECONDS, _REQUEST)
        self._queue = Durations(SECONDS)
        self._first = Durations(SECONDS, _FIRST_TOKEN)
        self._per_token = Durations(_PER_TOKEN)
        self._gaps = Durations(SECONDS)

    def observe_gaps(self, precision: str, seconds: Sequence[float]) -> None:
        """Counts the times between tokens of one step's rows."""
        self._gaps.observe(seconds, (precision, "", ""))

    def observe_request(self, ended: Ended, span: SpanIds | None) -> None:
        """Counts a generation that succeeded or failed; of those that failed, the whole time alone."""
        if ended.params is None or ended.outcome == "cancelled":
            return  # nothing was generated, or its length was the client's decision
        line = ended.timeline
        labels = ended.precision, ended.operation, ended.outcome if ended.failed else ""
        if ended.failed:
            self._request.observe((line.elapsed(),), labels, span)
        elif line.first_token is not None:
            self._request.observe((line.total_seconds,), labels, span)
            self._queue.observe((line.queue_seconds,), labels, span)
            self._first.observe((line.first_token - line.arrived,), labels, span)
            if line.tokens > 1:
                self._per_token.observe((line.decode_seconds / (line.tokens - 1),), labels, span)

    def collect(self) -> Iterator[Metric]:
        """Bitdial's own histograms, of requests that succeeded."""
        for name, text, durations in (
            ("request_duration_seconds", "Arrival to last token", self._request),
            ("queue_duration_seconds", "Arrival to a slot", self._queue),
            ("time_to_first_token_seconds", "Arrival to first token", self._first),
            ("inter_token_latency_seconds", "Between a row's tokens", self._gaps),
        ):
            family = HistogramMetricFamily(f"bitdial_{name}", text, labels=_OWN_LABELS)
            yield durations.histogram(family, SECONDS, self._own_labels)

    def conventional(self) -> Iterator[Metric]:
        """OpenTelemetry's histograms, with underscores for dots."""
        for name, text, durations, bounds in (
            ("request_duration", "Arrival to last token, or to the error", self._request, _REQUEST),
            ("time_to_first_token", "Arrival to first token", self._first, _FIRST_TOKEN),
            ("time_per_output_token", "Mean time of the tokens after the first", self._per_token, _PER_TOKEN),
        ):
            family = HistogramMetricFamily(f"gen_ai_server_{name}", text, labels=GEN_AI_LABELS)
            yield durations.histogram(family, bounds, self._gen_ai_labels)

    def _own_labels(self, labels: Labels) -> Labels | None:
        precision, _, error = labels
        return None if error else (self._model, precision)

    def _gen_ai_labels(self, labels: Labels) -> Labels | None:
        precision, operation, error = labels
        return operation, PROVIDER, self._model, self._model, precision, error
