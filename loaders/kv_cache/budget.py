"""The memory that the KV caches of all precisions of a process share."""

import sys
import threading
from itertools import count
from typing import Protocol
from weakref import WeakSet

_RETURNED_TOGETHER = 16  # free blocks whose pages are returned to the system at once


class Member(Protocol):
    """A pool of the budget, as the budget uses it; see ``BlockPool``."""

    block_bytes: int

    @property
    def held_blocks(self) -> int:
        """Blocks of sequences, and cached ones."""
        ...

    @property
    def unreturned_blocks(self) -> int:
        """Free blocks that still occupy memory."""
        ...

    @property
    def idle_blocks(self) -> int:
        """Cached blocks that no sequence uses."""
        ...

    @property
    def oldest_idle(self) -> int | None:
        """The tick at which the least recently used idle block became idle; None without one."""
        ...

    def evict(self) -> None:
        """Makes the least recently used idle block a free one."""
        ...

    def return_memory(self, blocks: int) -> None:
        """Returns the memory of up to so many free blocks to the system."""
        ...


class KVBudget:
    """Bytes for the blocks of all pools together. One per process; thread-safe.

    Pools are held weakly: a pool that is dropped without being closed no longer counts.

    Args:
        limit: bytes; None: unlimited.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.lock = threading.RLock()
        """Held by every operation of a pool that takes or gives blocks."""
        self.version = 0
        """Grows whenever blocks may have become available: what was refused before may be granted now."""
        self._pools: WeakSet[Member] = WeakSet()
        self._ticks = count()
        self._queue: list[Member] = []  # pools with a sequence that waits for blocks, first come first

    def join(self, pool: Member) -> None:
        with self.lock:
            self._pools.add(pool)

    def leave(self, pool: Member) -> None:
        """The pool's blocks no longer count."""
        with self.lock:
            self._pools.discard(pool)
            self.stop_waiting(pool)
            self.version += 1

    @property
    def used(self) -> int:
        """Bytes of the blocks that are in use or cached."""
        with self.lock:
            return sum(pool.held_blocks * pool.block_bytes for pool in self._pools)

    @property
    def committed(self) -> int:
        """``used``, and the bytes of free blocks whose memory was not returned yet; at most ``limit``."""
        with self.lock:
            return sum((pool.held_blocks + pool.unreturned_blocks) * pool.block_bytes for pool in self._pools)

    def tick(self) -> int:
        """A number larger than all before."""
        return next(self._ticks)

    def obtainable(self, pool: Member) -> int:
        """Bytes that the pool may commit beside its own: unused ones, and those that others can give up."""
        if self.limit is None:
            return sys.maxsize
        others = (other for other in self._pools if other is not pool)
        spare = sum((other.unreturned_blocks + other.idle_blocks) * other.block_bytes for other in others)
        return max(0, self.limit - self.committed + spare)

    def make_room(self, pool: Member, size: int) -> bool:
        """Whether ``pool`` may commit ``size`` more bytes now.

        For that, other pools return the memory of free blocks, then of cached ones, least recently used
        first; False where the pool's own cached block is the least recently used of all, or nothing is left.
        """
        while self.limit is not None and (missing := self.committed + size - self.limit) > 0:
            if not self._reclaim(pool, missing):
                return False
        return True

    def _reclaim(self, pool: Member, missing: int) -> bool:
        for other in self._pools:
            if other is not pool and other.unreturned_blocks:
                other.return_memory(max(_RETURNED_TOGETHER, -(-missing // other.block_bytes)))
                return True
        found = [(tick, other) for other in self._pools if (tick := other.oldest_idle) is not None]
        oldest = min(found, key=lambda pair: pair[0], default=(0, pool))[1]
        if oldest is pool:
            return False
        oldest.evict()
        return True

    # Which pool may admit its next sequence: without an order, a busy one could starve the others.

    def is_first(self, pool: Member) -> bool:
        """Whether no other pool has waited for longer."""
        return not self._queue or self._queue[0] is pool

    def wait(self, pool: Member) -> None:
        """Queues the pool, unless it waits already."""
        if pool not in self._queue:
            self._queue.append(pool)

    def stop_waiting(self, pool: Member) -> None:
        with self.lock:
            if pool in self._queue:
                self._queue.remove(pool)
                self.version += 1
