"""The queue of spans that wait for an export; the log has the number of those that it drops when full."""

import logging
import threading
import time

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

_EVERY_SECONDS = 60.0
_log = logging.getLogger(__name__)


class Dropped:
    """Counts dropped spans. The SDK keeps no number of them: it follows from what went in and out.

    A batch counts as out a moment after it has left the queue. What goes in meanwhile may be counted as
    dropped too early, but no more than once: the estimate of the queue's length is then as much too low.

    Args:
        capacity: spans that the queue holds.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._waiting = capacity, 0
        self._dropped = self._logged = 0
        self._next_line = 0.0
        self._lock = threading.Lock()  # spans go in on the event loop, and out on the exporting thread

    def note_in(self) -> None:
        """A span goes in; where the queue is full, the oldest is dropped for it."""
        with self._lock:
            if self._waiting < self._capacity:
                self._waiting += 1
            else:
                self._dropped += 1

    def note_out(self, spans: int) -> None:
        """A batch leaves the queue."""
        with self._lock:
            self._waiting -= spans

    def log(self, last: bool = False) -> None:
        """Logs how many were dropped since the last line, at most once a minute.

        Args:
            last: logs them in any case; no other line will follow.
        """
        with self._lock:
            new, now = self._dropped - self._logged, time.monotonic()
            if not new or (now < self._next_line and not last):
                return
            self._logged, self._next_line = self._dropped, now + _EVERY_SECONDS
        message = "%d spans dropped: %d already waited (OTEL_BSP_MAX_QUEUE_SIZE); requests are not affected"
        _log.warning(message, new, self._capacity)


class SpanQueue(BatchSpanProcessor):
    """OpenTelemetry's queue and its thread.

    Args:
        dropped: its exporter notes in it what leaves the queue.
        queue: spans that may wait; the oldest are dropped for others.
        delay: milliseconds between exports.
        batch: spans of one export.
    """

    def __init__(
        self, exporter: SpanExporter, dropped: Dropped, queue: int, delay: float, batch: int
    ) -> None:
        super().__init__(exporter, queue, delay, batch)
        self._noted = dropped

    def on_end(self, span: ReadableSpan) -> None:
        """Puts a sampled span in; it never waits."""
        if span.context is not None and span.context.trace_flags.sampled:
            self._noted.note_in()
        super().on_end(span)
