"""Logging: one line a record on stderr, readable or JSON."""

import json
import logging
import time
from collections.abc import Iterable

from server.http.redaction import Redaction


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what callers pass in ``extra={"fields": {...}}`` becomes its members."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class RedactingFormatter(logging.Formatter):
    """Another formatter's lines without the keys, wherever in a record they are."""

    def __init__(self, formatter: logging.Formatter, secrets: Iterable[str]) -> None:
        super().__init__()
        self._formatter, self._redacted = formatter, Redaction(secrets)

    def format(self, record: logging.LogRecord) -> str:
        return self._redacted(self._formatter.format(record))


def set_up_logging(json_output: bool, level: str = "info", secrets: Iterable[str] = ()) -> None:
    """Of the whole process, on stderr.

    Args:
        level: the least that bitdial's own loggers write; the libraries write warnings and worse.
        secrets: what no line may show.
    """
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(RedactingFormatter(JsonFormatter() if json_output else plain, secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    # it warns of each request that is no HTTP, which the access log has as well
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    for name in ("server", "loaders"):
        logging.getLogger(name).setLevel(level.upper())
