"""Logging: one line a record on stderr, readable or JSON."""

import json
import logging
import time
from collections.abc import Iterable

from server.http.log_context import current_ids
from server.http.redaction import Redaction


class JsonFormatter(logging.Formatter):
    """One JSON object a line; the values passed in ``extra={"fields": {...}}`` become its members, and the
    ids of the request that logs them."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **current_ids(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class RedactingFormatter(logging.Formatter):
    """Formats with another formatter and redacts the keys anywhere in the line."""

    def __init__(self, formatter: logging.Formatter, secrets: Iterable[str]) -> None:
        super().__init__()
        self._formatter, self._redacted = formatter, Redaction(secrets)

    def format(self, record: logging.LogRecord) -> str:
        return self._redacted(self._formatter.format(record))


def set_up_logging(json_output: bool, level: str = "info", secrets: Iterable[str] = ()) -> None:
    """Configures the logging of the whole process, to stderr.

    Args:
        level: lowest level of bitdial's own loggers; libraries log warnings and above.
        secrets: strings redacted in every line.
    """
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(RedactingFormatter(JsonFormatter() if json_output else plain, secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    # it warns of each request that is not valid HTTP, which the access log records too
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    for name in ("server", "loaders"):
        logging.getLogger(name).setLevel(level.upper())
