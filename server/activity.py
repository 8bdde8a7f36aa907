"""Whether the server is idle: read by reports and the shadow, which compute on idle capacity only."""

from typing import Protocol


class Workload(Protocol):
    """A component that can be busy."""

    def is_busy(self) -> bool: ...


class Activity:
    """One instance per app, shared by ``Reports`` and ``Shadow``. Event loop only.

    Args:
        workloads: busy with requests or loads; without any, the server is always idle.
    """

    def __init__(self, *workloads: Workload) -> None:
        self._workloads = workloads
        self.replaying = False
        """Set by the ``Shadow`` that replays a request; of several models one does at a time."""
        self.measuring = False
        """Set by the ``Reports`` that make one: two at a time would disturb each other's figures."""

    def is_busy(self) -> bool:
        """Whether a request runs or waits, or a precision is being loaded."""
        return any(workload.is_busy() for workload in self._workloads)

    def is_idle(self) -> bool:
        """Whether there is no request, no load and no replay."""
        return not (self.is_busy() or self.replaying)
