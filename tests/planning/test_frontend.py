"""What HTTP adds, from a client whose server's times are known."""

import asyncio
from itertools import accumulate
from typing import Any

import pytest

from server.bench.errors import BenchError
from server.bench.http.client import Answer
from server.planning import frontend
from server.planning.frontend import FrontendRounds
from server.planning.step_times import ROUNDS
from server.planning.workload import Frontend
from tests.planning.measured import step_times

REQUEST, STEP, TOKEN = 0.003, 0.0004, 0.00002


class KnownClient:
    """Streams as from a server whose engine takes the times of ``TIMES``."""

    url = "http://known"

    def __init__(self, error: str | None = None) -> None:
        self.error = error
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
        prefill = TIMES.prefill_seconds(frontend.PROMPT, 128)
        decode = TIMES.seconds(rows, 0, rows * (frontend.PROMPT + frontend.TOKENS / 2))
        first = REQUEST + 0.001 + prefill
        gap = decode + STEP + rows * TOKEN
        answer = Answer(0.0, list(accumulate([first] + [gap] * (tokens - 1))), self.error)
        answer.last = {"timings": {"queue_ms": 1.0, "prefill_ms": prefill * 1000}}
        return answer


TIMES = step_times()


async def measured(client: KnownClient) -> Frontend:
    rounds = FrontendRounds(client, None)  # type: ignore[arg-type]
    await rounds.prepare()
    for _ in range(ROUNDS):
        await rounds.round()
    return rounds.frontend(TIMES)


def test_what_http_adds_is_told_apart_from_the_engines_times() -> None:
    found = asyncio.run(measured(KnownClient()))
    assert found.request_seconds == pytest.approx(REQUEST)
    assert found.step_seconds == pytest.approx(STEP, rel=1e-3)
    assert found.token_seconds == pytest.approx(TOKEN, rel=1e-3)


def test_a_request_that_fails_ends_the_measurement() -> None:
    with pytest.raises(BenchError, match="a request to the measured server failed: status 500"):
        asyncio.run(measured(KnownClient(error="status 500")))
