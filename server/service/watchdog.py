"""Watches the engines: a worker that hangs fails its requests and makes the process exit with an error."""

import asyncio

from server.lifecycle import Lifecycle
from server.service.pool import Pool

_PERIOD = 0.5  # seconds


async def watch(pool: Pool, lifecycle: Lifecycle, hang_timeout: float) -> None:
    """Fails every engine whose step takes longer than ``hang_timeout`` seconds, until cancelled."""
    while True:
        await asyncio.sleep(_PERIOD)
        for engine in pool.engines:
            if (stalled := engine.stalled_seconds) > hang_timeout:
                reason = f"a step has made no progress for {stalled:.0f} s"
                engine.fail(reason)
                lifecycle.fail(f"{pool.title(pool.state(engine.precision))}: {reason}")
