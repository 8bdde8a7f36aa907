"""One free place admits one request, and no promised place leaks."""

import select
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import FastAPI

from server.http.middleware import RequestContext
from tests.conftest import Loads, serving, wait_until
from tests.http.connection.test_early_refusal import BODY, KEY, answer, kept
from tests.http.connection.test_slow_clients import connected, request_for, status_of
from tests.http.test_overload import Gate

MakeApp = Callable[..., FastAPI]


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_free_place_lets_one_request_into_the_framework(
    make_app: MakeApp, loads: Loads, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """However many arrive before it reserves its place."""
    app, entered = make_app(max_concurrent_requests=1), []
    real = RequestContext.__call__

    async def counted(self: RequestContext, scope: Any, *rest: Any) -> None:
        entered.append(scope["path"])
        await real(self, scope, *rest)

    with serving(app) as address, ExitStack() as opened:
        gate = Gate(loads.runners["fp32"])
        request = request_for("/generate", BODY)
        clients = [opened.enter_context((kept if is_kept else connected)(address)) for _ in range(20)]
        monkeypatch.setattr(RequestContext, "__call__", counted)
        for client in clients:
            client.sendall(request)
        wait_until(lambda: len(select.select(clients, [], [], 0.1)[0]) == 19)
        gate.opened.set()
        assert sorted(status_of(answer(client)[0]) for client in clients) == [200] + [429] * 19
        assert entered == ["/generate"]


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("is_kept", [True, False])
def test_no_promised_place_is_lost(make_app: MakeApp, is_kept: bool, leaves: bool) -> None:
    app = make_app(max_concurrent_requests=2, api_key="secret")
    bodies = [BODY, {}, {**BODY, "max_new_tokens": -1}, {**BODY, "precision": "int3"}, {"inputs": "x" * 999}]
    with serving(app) as address:
        service = app.state.service
        for path in (
            "/generate",
            "/generate_stream",
            "/compare",
            "/tokenize",
            "/models/a/b",
            "/v1/completions",
        ):
            for headers in ([KEY], []):
                for body in bodies:
                    with (kept if is_kept else connected)(address) as connection:
                        connection.sendall(request_for(path, body, *headers))
                        if not leaves:
                            connection.recv(1)
                    wait_until(lambda: (service.places.promised.count, service.places.in_flight) == (0, 0))


def test_a_lingering_connection_holds_no_place(make_app: MakeApp) -> None:
    app = make_app(max_concurrent_requests=2)
    many = [f"X-{number}: 1" for number in range(255)]  # one line more than a head may have
    with serving(app) as address, connected(address) as connection:
        connection.sendall(request_for("/generate", BODY, *many))
        assert status_of(connection.recv(65536)) == 431
        assert app.state.service.places.promised.count == 0
