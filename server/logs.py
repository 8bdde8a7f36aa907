"""Logging: one line a record on stderr, readable or JSON."""

import json
import logging
import time


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


def set_up_logging(json_output: bool, level: str = "info") -> None:
    """
    Args:
        level: the least that bitdial's own loggers write; the libraries write warnings and worse.
    """
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if json_output else plain)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    for name in ("server", "loaders"):
        logging.getLogger(name).setLevel(level.upper())
