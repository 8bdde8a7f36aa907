"""The ``Retry-After`` of refusals: spread at random, and longer for a longer queue."""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest
from fastapi import FastAPI

from server.errors import NotReady, Overloaded, ServiceError
from server.http.retry_after import retry_after
from tests.conftest import entered

MakeApp = Callable[..., FastAPI]


@pytest.mark.parametrize(
    ("error", "least", "middle", "most"),
    [
        (Overloaded("full"), 1, 2, 3),
        (Overloaded("full", retry_spread=20.4), 1, 12, 22),
        (Overloaded("full", retry_spread=1e9), 1, 31, 60),
        (NotReady("draining"), 2, 3, 4),
        (NotReady("no room", retry_after=5), 5, 6, 7),
        (NotReady("never", retry_after=1e9, retry_spread=1e9), 30, 45, 60),
        (Overloaded("now", retry_after=0, retry_spread=0), 1, 1, 1),
    ],
)
def test_it_is_a_whole_number_of_seconds_spread_at_random(
    error: ServiceError, least: int, middle: int, most: int
) -> None:
    drawn = [retry_after(error, partial(float, number)) for number in (0.0, 0.5, 0.9999)]
    assert drawn == [least, middle, most]


def test_errors_that_waiting_does_not_fix_have_none() -> None:
    assert retry_after(ServiceError("no")) is None


def test_it_follows_the_queue(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> tuple[set[int], set[int]]:
        async with entered(app) as client:
            app.state.service.places.in_flight = 1

            async def answer(drain: float | None) -> set[int]:
                monkeypatch.setattr(app.state.pool.host, "drain_seconds", lambda: drain)
                monkeypatch.setattr("server.service.admission._DRAIN_AGE", 0.0)
                replies = [await client.post("/generate", json={"inputs": "x"}) for _ in range(60)]
                return {int(reply.headers["retry-after"]) for reply in replies}

            found = await answer(None), await answer(15.0)
            app.state.service.places.in_flight = 0
            return found

    app = make_app(max_concurrent_requests=1)
    unknown, long = asyncio.run(main())
    assert unknown == {1, 2, 3}
    assert len(long) > 10
    assert long <= set(range(1, 32))
