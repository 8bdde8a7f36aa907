"""What a pool does in the background: it loads the start-up precisions and unloads idle ones."""

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from server.errors import ServiceError
from server.lifecycle import EXIT_FAILED, Lifecycle

if TYPE_CHECKING:
    from server.service.pool import Pool

_log = logging.getLogger(__name__)


async def load_first(pool: "Pool", names: Iterable[str], lifecycle: Lifecycle | None) -> None:
    """Loads the precisions in turn, as far as there is room: none is unloaded for a later one.

    Args:
        lifecycle: fails if the default one can't be loaded; None: it may load later.
    """
    for name in names:
        state = pool.state(name)
        if state.state == "unavailable":
            _log.warning("%s can't be served here: %s", pool.title(state), state.reason)
        else:
            with suppress(ServiceError):  # it is in the state and in the log
                await pool.preload(name)
        failed = state.state in ("failed", "unavailable")
        if lifecycle is not None and name == pool.default and failed:
            lifecycle.fail(f"{pool.title(state)} could not be loaded: {state.reason}", EXIT_FAILED)


async def unload_idle(pool: "Pool", seconds: float) -> None:
    """Unloads every precision that has been idle for ``seconds``, until cancelled."""
    while True:
        await asyncio.sleep(min(seconds / 4, 10))
        for state in pool.idle():
            engine = None if state.users else state.engine  # a user may have come during the last unload
            if engine and time.perf_counter() - engine.last_used > seconds:
                await pool.unload(state.name)
