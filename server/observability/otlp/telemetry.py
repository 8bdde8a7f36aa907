"""Everything that an OpenTelemetry collector gets of one app."""

import asyncio
import logging

from opentelemetry.sdk.trace import SpanLimits

from server.observability.metrics import Metrics
from server.observability.otlp.destination import metrics_url, resource
from server.observability.otlp.metrics_export import MetricsExport
from server.observability.otlp.spans import Spans
from server.observability.otlp.tracing import Tracing

_log = logging.getLogger(__name__)


def check() -> None:
    """Raises: ValueError: a variable of OpenTelemetry's is invalid, without which nothing can start."""
    SpanLimits()


class Telemetry:
    """Traces, and metrics where their address is known.

    Args:
        url: the collector's address for traces.
    """

    def __init__(self, url: str) -> None:
        process, address = resource(), metrics_url(url)
        self._metrics: list[Metrics] = []
        self.spans = Spans(url, process)
        self._export = None if address is None else MetricsExport(self._metrics, address, process)
        if address is None:
            _log.info("no metrics are sent to the collector, only traces")

    def add(self, metrics: Metrics) -> Tracing:
        """Sends a model's metrics too; returns what its generations are to be observed by."""
        self._metrics.append(metrics)
        return Tracing(metrics, metrics.model, self.spans)

    async def run(self) -> None:
        """Sends metrics at intervals, until it is cancelled."""
        if self._export is not None:
            await self._export.run()

    async def close(self) -> None:
        """Sends what is left, for a limited time; after ``run`` was cancelled."""
        last = [] if self._export is None else [self._export.close()]
        await asyncio.gather(self.spans.close(), *last)
