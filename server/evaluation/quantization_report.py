"""The error of each quantized layer of the loaded precisions, computed at the first request."""

import asyncio
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

from loaders.layer_errors import LayerReport, layer_errors
from server.engine.engine import Engine
from server.host.threads import run_in_own_thread
from server.service.pool import Pool


class QuantizationReports:
    """Caches a report per engine; computes it on a single core, so that streams keep the others.

    Event loop only.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._found: WeakKeyDictionary[Engine, LayerReport | None] = WeakKeyDictionary()
        self._one_at_a_time = asyncio.Lock()

    async def of(self, precision: str) -> list[dict[str, Any]] | None:
        """Kind, bytes and error of every layer; None if the precision is not loaded or has no such report."""
        if self._pool.state(precision).engine is None:
            return None
        async with self._pool.use(precision) as engine, self._one_at_a_time:
            if engine not in self._found:
                self._found[engine] = await asyncio.to_thread(
                    run_in_own_thread, lambda: self._layer_errors(engine), 1
                )
            report = self._found[engine]
        return None if report is None else [asdict(layer) for layer in report.layers]

    def _layer_errors(self, engine: Engine) -> LayerReport | None:
        return layer_errors(engine.model, self._pool.spec)
