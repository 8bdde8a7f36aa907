"""Everything that an OpenTelemetry collector gets of one app."""

import asyncio
import logging

from server.observability.metrics import Metrics
from server.observability.otlp.destination import metrics_url, resource
from server.observability.otlp.metrics_export import MetricsExport
from server.observability.otlp.tracing import Tracing

_log = logging.getLogger(__name__)


class Telemetry:
    """Traces, and metrics where their address is known.

    Args:
        metrics: what is sent beside the traces, and what ``tracing`` passes observations on to.
        url: the collector's address for traces.
        model: the served model's name.
    """

    def __init__(self, metrics: Metrics, url: str, model: str) -> None:
        process = resource()
        self.tracing = Tracing(metrics, url, model, process)
        address = metrics_url(url)
        self.metrics = None if address is None else MetricsExport(metrics, address, process)
        if address is None:
            _log.info("no metrics are sent to the collector, only traces")

    async def close(self) -> None:
        """Sends what is left, for a limited time; after the task of ``metrics.run`` was cancelled."""
        closing = [] if self.metrics is None else [self.metrics.close()]
        await asyncio.gather(self.tracing.close(), *closing)
