"""Watches the engines: a worker that died or hangs ends its requests and, by its exit code, the process."""

import asyncio

from server.lifecycle import Lifecycle
from server.service.pool import Pool

_PERIOD = 0.5  # seconds


async def watch(pool: Pool, lifecycle: Lifecycle, hang_timeout: float) -> None:
    """Runs until cancelled. ``hang_timeout``: seconds that one step may take before it is given up."""
    while True:
        await asyncio.sleep(_PERIOD)
        for engine in pool.engines:
            if (stalled := engine.stalled_seconds) > hang_timeout:
                reason = f"a step has made no progress for {stalled:.0f} s"
                engine.fail(reason)
                lifecycle.fail(f"{engine.precision}: {reason}")
