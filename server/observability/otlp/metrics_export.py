"""Sends what ``/metrics`` has to a collector: read on the event loop, which counts it; sent by a thread."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource

from server.concurrency import run_for_future
from server.observability.exposition import merged
from server.observability.metrics import Metrics
from server.observability.otlp.destination import CLOSE_SECONDS, EXPORT_SECONDS, Failures
from server.observability.otlp.environment import metrics_interval
from server.observability.otlp.families import as_metrics_data
from server.observability.otlp.session import collector_session, unfinished, why_failed

_log = logging.getLogger(__name__)
T = TypeVar("T")


class MetricsExport:
    """Sends cumulative figures: a failed export loses nothing, the next one has it all.

    Args:
        metrics: those of each model.
        url: of the collector.
        resource: this process.
    """

    def __init__(self, metrics: Sequence[Metrics], url: str, resource: Resource) -> None:
        self._metrics, self._resource = metrics, resource
        self._session = collector_session("METRICS")
        self._exporter = OTLPMetricExporter(url, timeout=EXPORT_SECONDS, session=self._session)
        self._failures = Failures("metrics", url)
        self._began = time.time_ns()
        self._interval = metrics_interval(os.environ)

    async def run(self) -> None:
        """Exports at every interval, until it is cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self._export()
            except Exception:  # the next one may succeed
                _log.exception("metrics could not be exported")

    async def close(self) -> None:
        """Exports the last figures, within ``CLOSE_SECONDS``; to be called after ``run`` was cancelled."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._export()
        except TimeoutError:
            self._failures.note(unfinished(self._session))
        except Exception:
            _log.exception("metrics could not be exported")

    async def _export(self) -> None:
        own = (family for one in self._metrics for family in chain(one.families(), one.conventional()))
        data = as_metrics_data(merged(own), self._began, time.time_ns(), self._resource)
        self._failures.note(await _in_thread(partial(self._send, data)))

    def _send(self, data: MetricsData) -> str | None:
        """Why the data did not arrive; None if it did."""
        return why_failed(self._session, lambda: self._exporter.export(data) is MetricExportResult.SUCCESS)


async def _in_thread(work: Callable[[], T]) -> T:
    """As ``asyncio.to_thread``, but a collector that keeps the thread waiting does not keep the process."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    threading.Thread(target=run_for_future, args=(work, future), name="export-metrics", daemon=True).start()
    return await future
