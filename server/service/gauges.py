"""The gauges of every precision: what runs and waits in its engine, and the state of its cache."""

from loaders.runner import PagedRunner
from server.observability.metrics import Metrics
from server.service.pool import Pool


def set_gauges(metrics: Metrics, pool: Pool) -> None:
    for state in pool.states():
        engine = state.engine
        metrics.set_load(state.name, engine.running if engine else 0, engine.waiting if engine else 0)
        if engine and isinstance(runner := engine.model.runner, PagedRunner):
            metrics.set_kv_cache(
                state.name, runner.pool.stats(), engine.preemptions, runner.pool.committed_bytes
            )
