"""Responses on their way through the router: losses, deadlines, clients that leave. Without a cluster."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.types import Message, Scope

pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitdial[ray]'")
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from server.errors import NotReady, Overloaded, ServiceError
from server.ray.exchange import Forwarded, Head
from server.ray.fleet import Fleet, Relay, ReplicaLost, service_error
from server.ray.forwarding import Forwarding

REQUEST = Forwarded("POST", "/generate", b"", [])
EVENTS = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8")], b"data: 1\n\n", False)
JSON = Head(200, [(b"content-type", b"application/json")], b"{}", True)
Item = Head | bytes | ServiceError | float


class FakeRelay:
    """A response: its pieces, seconds to wait, and an error that ends it."""

    def __init__(self, items: list[Item]) -> None:
        self._items = items
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Head | bytes]:
        for item in self._items:
            if isinstance(item, ServiceError):
                raise item
            if isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item


class FakeFleet:
    """Replicas that answer one request each."""

    def __init__(self, *responses: list[Item]) -> None:
        self.relays = [FakeRelay(items) for items in responses]
        self.asked = 0

    def relay(self, name: str, request: Forwarded) -> FakeRelay:
        self.asked += 1
        return self.relays[self.asked - 1]


def forwarded(
    fleet: FakeFleet, seconds: float = 10.0, left: Callable[[], Any] = lambda: asyncio.sleep(3600)
) -> tuple[int, bytes]:
    """The status and body that a client gets, who leaves when ``left`` returns."""
    sent: list[Message] = []
    scope: Scope = {"type": "http", "method": "POST", "path": "/generate", "state": {"request_id": "id"}}

    async def receive() -> Message:
        await left()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    forwarding = Forwarding(fleet, seconds)  # type: ignore[arg-type]
    asyncio.run(forwarding.forward("fp32", REQUEST, scope, receive, send))
    body = b"".join(message["body"] for message in sent if message["type"] == "http.response.body")
    return sent[0]["status"] if sent else 0, body


def test_a_response_that_has_ended_is_not_waited_for() -> None:
    fleet = FakeFleet([JSON, 60.0])
    assert forwarded(fleet) == (200, b"{}")
    assert not fleet.relays[0].cancelled


def test_a_lost_replica_is_replaced_once() -> None:
    assert forwarded(FakeFleet([ReplicaLost()], [JSON])) == (200, b"{}")
    fleet = FakeFleet([ReplicaLost()], [ReplicaLost()], [JSON])
    status, body = forwarded(fleet)
    assert status == 503
    assert b'"error_type":"unavailable"' in body
    assert fleet.asked == 2  # a request that ends its replica must not end them all


def test_a_stream_whose_replica_is_lost_ends_with_an_error_event() -> None:
    fleet = FakeFleet([EVENTS, b"data: 2\n\n", ReplicaLost()], [JSON])
    status, body = forwarded(fleet)
    *events, last, rest = body.split(b"\n\n")
    assert (status, events, rest) == (200, [b"data: 1", b"data: 2"], b"")
    assert b'"error_type":"generation","request_id":"id"' in last
    assert fleet.asked == 1


def test_a_body_that_can_hold_no_error_is_broken_off() -> None:
    with pytest.raises(ReplicaLost):
        forwarded(FakeFleet([Head(200, JSON.headers, b"[", False), ReplicaLost()]))


def test_what_waits_too_long_for_a_replica_is_cancelled() -> None:
    fleet = FakeFleet([5.0, JSON])
    assert forwarded(fleet, seconds=-0.95)[0] == 504
    assert fleet.relays[0].cancelled


def test_a_client_that_leaves_cancels_the_request() -> None:
    fleet = FakeFleet([EVENTS, 5.0])
    assert forwarded(fleet, left=lambda: asyncio.sleep(0.02)) == (200, b"data: 1\n\n")
    assert fleet.relays[0].cancelled


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BackPressureError(num_queued_requests=3, max_queued_requests=3), Overloaded),
        (DeploymentUnavailableError("fp32"), NotReady),
        (Overloaded("full"), Overloaded),
    ],
)
def test_errors_of_ray_are_errors_of_the_service(error: Exception, kind: type[ServiceError]) -> None:
    assert isinstance(service_error(error), kind)
    assert service_error(error).retry_after
    assert type(service_error(RuntimeError("/secret/path"))) is ServiceError
    assert service_error(RuntimeError("/secret/path")).message == "internal error"


class NotStarted:
    """A call of a deployment that has failed to start: waiting for it raises, and cancelling it too."""

    error = DeploymentUnavailableError("fp32")

    def __aiter__(self) -> "NotStarted":
        return self

    async def __anext__(self) -> Head:
        raise self.error

    def cancel(self) -> None:
        raise self.error


def test_a_deployment_that_failed_to_start_is_unavailable() -> None:
    class Unavailable(FakeFleet):
        def relay(self, name: str, request: Forwarded) -> Any:
            return Relay(NotStarted())

    status, body = forwarded(Unavailable())
    assert status == 503
    assert b"replicas can't be started" in body


def test_a_call_that_is_cancelled_ends_with_its_caller() -> None:
    class Handle:
        def options(self, **_: object) -> "Handle":
            return self

        def remote(self, *_: object) -> "Call":
            return Call()

    class Call(NotStarted):
        def __await__(self) -> Any:
            return asyncio.sleep(60).__await__()

    async def run() -> None:
        task = asyncio.create_task(Fleet("fp32", {"fp32": Handle()}).call("fp32", "models"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_what_is_no_error_of_the_service_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    service_error(RuntimeError("no such actor"))
    assert "no such actor" in caplog.text
