"""Where telemetry goes, whose it is, and what is logged when it doesn't arrive."""

import logging
import os
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from server.observability.otlp.environment import sends
from server.version import VERSION

EXPORT_SECONDS = 5.0
"""The longest that one export is tried for."""
CLOSE_SECONDS = 2.0
"""The longest that stopping the server waits for the last exports."""
_TRACES, _METRICS = "/v1/traces", "/v1/metrics"
_MOST_REASONS = 8  # of one row of failures
_log = logging.getLogger(__name__)


def metrics_url(traces_url: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The address of metrics beside that of traces; None if none is known, or metrics are turned off.

    Args:
        traces_url: the setting, which names one address; nothing follows from a path other than OTLP's.
        environment: OpenTelemetry's own variables.
    """
    if not sends("METRICS", environment):
        return None
    if own := environment.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "").strip():
        return own
    parts = urlsplit(traces_url)
    path = parts.path.rstrip("/")
    if not path.endswith(_TRACES):
        return None
    return parts._replace(path=path.removesuffix(_TRACES) + _METRICS).geturl()


def resource() -> Resource:
    """This process. Its id tells its series from other servers'; the environment may name more."""
    defaults = {
        "service.name": "bitdial",
        "service.version": VERSION,
        "service.instance.id": str(uuid.uuid4()),
    }
    return Resource.create({**defaults, **OTELResourceDetector().detect().attributes})


class Failures:
    """Logs why exports fail, each reason once until one succeeds again: not every attempt.

    Args:
        what: what is exported, for the message.
        url: the collector's address, for the message.
    """

    def __init__(self, what: str, url: str) -> None:
        self._what, self._address = what, _without_secrets(url)
        self._count = 0
        self._logged = set[str]()

    def note(self, reason: str | None) -> None:
        """
        Args:
            reason: why an export failed; None: it succeeded.
        """
        if reason is None:
            if self._count:
                _log.info("%s arrive again, after %d failed exports", self._what, self._count)
            self._count = 0
            self._logged.clear()
            return
        self._count += 1
        if reason not in self._logged and len(self._logged) < _MOST_REASONS:
            self._logged.add(reason)
            message = "%s can't be sent to %s: %s; requests are not affected"
            _log.warning(message, self._what, self._address, reason)


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()
