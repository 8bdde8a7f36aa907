"""How many replicas a host like this one holds, by memory and by cores, and how many hosts a plan needs."""

import math
from dataclasses import dataclass
from typing import Literal

from server.host import memory
from server.host.threads import default_threads


@dataclass(frozen=True)
class HostSize:
    """What this host has for replicas.

    Args:
        memory_bytes: on the device, within a container's limit, for replicas alone: in total, less the margin
            that serving keeps too.
        side_by_side: replicas that compute at once as fast as the measured one alone, which had all of its
            threads, or the whole card.
    """

    memory_bytes: int
    side_by_side: int

    @classmethod
    def of(cls, device: Literal["cpu", "cuda"], threads: int) -> "HostSize":
        """Args: threads: of a replica."""
        beside = 1 if device == "cuda" else max(1, default_threads() // threads)
        return cls(memory.capacity_bytes(device), beside)

    def replicas(self, memory_bytes: int) -> int:
        """Replicas of so many bytes that one host takes; 0 if not even one fits."""
        return min(self.memory_bytes // memory_bytes, self.side_by_side)

    def hosts(self, replicas: int, memory_bytes: int) -> int:
        """Hosts of this size that take the replicas.

        Raises:
            ZeroDivisionError: not even one fits a host.
        """
        return math.ceil(replicas / self.replicas(memory_bytes))
