"""What HTTP adds, from a client whose server's times are known."""

import asyncio
from itertools import accumulate
from typing import Any

import pytest

from server.bench.errors import BenchError
from server.bench.http.client import Answer
from server.planning import frontend
from server.planning.workload import Replica
from tests.planning.measured import step_times

REQUEST, STEP, TOKEN = 0.003, 0.0004, 0.00002


class KnownClient:
    """Streams as from a server on a host ``drift`` times as slow as when ``TIMES`` were calibrated."""

    url = "http://known"

    def __init__(self, drift: float = 1.0, error: str | None = None) -> None:
        self.drift, self.error = drift, error
        self.open = 0

    async def ask(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        if body is None:
            return {"max_total_tokens": 1024}
        starts = [number for number, letter in enumerate(body["inputs"]) if letter != " "]
        return [{"start": start, "stop": start + 1} for start in starts]

    async def stream(self, text: str, tokens: int, precision: str | None) -> Answer:
        self.open += 1
        await asyncio.sleep(0)  # the others open as well
        rows = self.open
        await asyncio.sleep(0)
        self.open -= 1
        prefill = self.drift * TIMES.prefill_seconds(frontend.PROMPT, 128)
        decode = TIMES.seconds(rows, 0, rows * (frontend.PROMPT + frontend.TOKENS / 2))
        first = self.drift * REQUEST + 0.001 + prefill
        gap = self.drift * (decode + STEP + rows * TOKEN)
        answer = Answer(0.0, list(accumulate([first] + [gap] * (tokens - 1))), self.error)
        answer.last = {"timings": {"queue_ms": 1.0, "prefill_ms": prefill * 1000}}
        return answer


TIMES = step_times()


@pytest.mark.parametrize("drift", [1.0, 1.5])
def test_what_http_adds_is_told_apart_from_the_hosts_drift(drift: float) -> None:
    found = asyncio.run(frontend.measure_on(KnownClient(drift), None, TIMES, Replica(8)))  # type: ignore[arg-type]
    assert found.request_seconds == pytest.approx(REQUEST * drift)
    assert found.step_seconds == pytest.approx(STEP, rel=1e-3)
    assert found.token_seconds == pytest.approx(TOKEN, rel=1e-3)


def test_a_request_that_fails_ends_the_measurement() -> None:
    with pytest.raises(BenchError, match="a request to the measured server failed: status 500"):
        asyncio.run(frontend.measure_on(KnownClient(error="status 500"), None, TIMES, Replica(8)))  # type: ignore[arg-type]
