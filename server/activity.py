"""Whether the server has work to do: read by what computes on idle capacity only."""

from typing import Protocol


class Workload(Protocol):
    """A part of the server that has work at times."""

    def is_busy(self) -> bool: ...


class Activity:
    """One instance, given to the reports and to the shadow. Event loop only.

    Args:
        workloads: what requests keep busy; without any, the server is always idle.
    """

    def __init__(self, *workloads: Workload) -> None:
        self._workloads = workloads
        self.replaying = False
        """Whether the shadow replays a request; set by it."""

    def is_busy(self) -> bool:
        """Whether a request runs or waits, or a precision is being loaded."""
        return any(workload.is_busy() for workload in self._workloads)

    def is_idle(self) -> bool:
        """Whether nothing computes: no request, no load, no replay."""
        return not (self.is_busy() or self.replaying)
