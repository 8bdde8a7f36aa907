"""What the models of one server share: memory, the CPU's turn, one load at a time."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loaders.base import LoadedModel, ModelSpec
from server.engine.fair_lock import FairLock
from server.errors import NotReady
from server.host import memory
from server.service.kv_memory import KVMemory
from server.service.precision_state import PrecisionState
from server.settings.server import Settings

if TYPE_CHECKING:
    from server.service.pool import Pool


class HostResources:
    """One per app, for the pools of all its models. Event loop only.

    Args:
        settings: the server's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.device = settings.resolved_device()
        self.pools: list[Pool] = []
        """The first one is of the server's default model."""
        self.kv_memory = KVMemory(settings, self._weights_first)
        self.turn = FairLock() if self.device == "cpu" else None
        """Held for a step: engines on the same CPU alternate."""
        self.loading = asyncio.Lock()
        """Held for a load: a second one would count on the same free memory, and ``transformers`` sets
        torch's default dtype for the whole process while it loads, then restores what it found."""

    def _weights_first(self) -> list[tuple[ModelSpec, Sequence[str]]]:
        return [(pool.spec, pool.first) for pool in self.pools]

    def models(self) -> list[LoadedModel]:
        return [engine.model for pool in self.pools for engine in pool.engines]

    def drain_seconds(self) -> float | None:
        """The longest estimate until running and waiting sequences end; None without one."""
        engines = [engine for pool in self.pools for engine in pool.engines]
        known = [seconds for engine in engines if (seconds := engine.drain_seconds()) is not None]
        return max(known, default=None)

    def used_bytes(self) -> int:
        """What the loaded precisions take, and what their caches may take."""
        return self.kv_memory.used_bytes(self.models())

    def free_bytes(self) -> int:
        """What another precision may take; negative if the loaded ones exceed the budget."""
        free = memory.free_bytes(self.device) - self.kv_memory.uncommitted_bytes(self.models())
        budget = self._settings.memory_budget
        return free if budget is None else min(free, budget - self.used_bytes())

    async def make_room(self, title: str, needed: int, unload: bool = True) -> None:
        """Unloads idle precisions, of any model, least recently used first.

        Args:
            title: what is to be loaded.
            needed: bytes.
            unload: False: only if there is room already.

        Raises:
            NotReady: that would not be enough; nothing is unloaded then.
        """
        while needed > (free := self.free_bytes()):
            idle = [(pool, state) for pool in self.pools for state in pool.idle()] if unload else []
            freed = self._freed_bytes([state for _, state in idle])
            if not idle or needed > free + freed:
                more = f", {freed} more with idle precisions unloaded" if unload else ""
                raise NotReady(f"no room for {title}: it needs {needed} bytes, {max(free, 0)} are free{more}")
            pool, state = min(idle, key=lambda found: _last_used(found[1]))
            await pool.unload(state.name)

    def _freed_bytes(self, idle: Sequence[PrecisionState]) -> int:
        """What unloading these frees, as counted by ``used_bytes``."""
        leaving = [state.engine.model for state in idle if state.engine is not None]
        staying = [model for model in self.models() if not any(model is one for one in leaving)]
        return self.used_bytes() - self.kv_memory.used_bytes(staying)


def _last_used(state: PrecisionState) -> float:
    return state.engine.last_used if state.engine else 0.0
