"""Whose fault a failed load is, for the metrics: the server's, or the client's that asked for it."""

from pathlib import Path

import pytest

from loaders.errors import CheckpointError
from server.errors import NotReady
from server.host import memory
from server.service.pool import Pool
from tests.service.test_pool import Loads, with_pool


@pytest.mark.parametrize(
    ("promised", "outcome"), [(("fp32", "nf4"), "unavailable"), (("fp32",), "not_loaded")]
)
@pytest.mark.parametrize("budget", [None, 999], ids=["load fails", "no room"])
def test_a_failed_load_is_the_servers_fault_where_the_operator_promised_the_precision(
    promised: tuple[str, ...],
    outcome: str,
    budget: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "needed_bytes", lambda precision, spec: 1000 if budget else 0)

    async def check(pool: Pool, loads: Loads) -> None:
        loads.error = CheckpointError("the file is cut short")
        for _ in range(2):
            with pytest.raises(NotReady) as refused:
                async with pool.use("nf4"):
                    pass
            error = refused.value
            assert (error.outcome, error.status, error.error_type) == (outcome, 503, "unavailable")
            assert error.retry_after is not None

    with_pool(tmp_path, check, precisions=promised, memory_budget=budget)
