"""The latest values of one precision, which the percentiles of ``/stats`` are computed over."""

from collections import deque
from dataclasses import dataclass, field, fields

_WINDOW = 1024  # latest values


def _window() -> deque[float]:
    return deque(maxlen=_WINDOW)


@dataclass
class Record:
    """One precision's latest values, in seconds."""

    queue: deque[float] = field(default_factory=_window)
    first_token: deque[float] = field(default_factory=_window)
    gaps: deque[float] = field(default_factory=_window)
    single_row_gaps: deque[float] = field(default_factory=_window)
    total: deque[float] = field(default_factory=_window)
    requests: int = 0
    tokens: int = 0
    busy: float = 0.0

    def absorb(self, other: "Record") -> None:
        """Adds the values of another process; its windows come on top of these."""
        for mine in fields(self):
            value, more = getattr(self, mine.name), getattr(other, mine.name)
            if isinstance(value, deque):
                setattr(self, mine.name, deque([*value, *more]))
            else:
                setattr(self, mine.name, value + more)
