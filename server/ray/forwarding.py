"""A response on its way from a replica to the client: cancelled with the client, repeated after a loss."""

import asyncio
import logging
from contextlib import suppress

from starlette.types import Receive, Scope, Send

from server.concurrency import Interrupted, run_until
from server.errors import DeadlinePassed, GenerationFailed, ServiceError
from server.http.responses import error_body, error_response, note_refusal, request_id
from server.http.route_facts import facts_of
from server.http.streaming import disconnected, event
from server.ray.exchange import Forwarded, Head
from server.ray.fleet import Fleet, Relay, ReplicaLost

_log = logging.getLogger("server.ray")
_TRIES = 2  # a request that ends its replica must not end them all
_GRACE_SECONDS = 1.0  # the replica's own answer to a passed deadline comes first
_EVENTS = b"text/event-stream"


class Forwarding:
    """Passes requests on to replicas, and their responses back.

    Args:
        fleet: the deployments.
        seconds: from a request's arrival to the head of its response, waiting for a replica included.
    """

    def __init__(self, fleet: Fleet, seconds: float) -> None:
        self._fleet, self._seconds = fleet, seconds

    async def forward(
        self, name: str, request: Forwarded, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answers a request by a replica of ``name``.

        A replica that ends before its response has begun is replaced by another one, once.
        """
        response = _Response(scope, send)
        for tries_left in reversed(range(_TRIES)):
            relay = self._fleet.relay(name, request)
            try:
                with suppress(Interrupted):  # the client has disconnected
                    await run_until(
                        disconnected(receive), self._copy(relay, response), _Once(relay, response)
                    )
                return
            except ServiceError as error:
                if isinstance(error, ReplicaLost) and tries_left and not response.begun:
                    _log.warning("request %s: its replica has ended; sent to another", request_id(scope))
                    continue
                await response.fail(error)
                return

    async def _copy(self, relay: Relay, response: "_Response") -> None:
        try:
            async with asyncio.timeout(self._seconds + _GRACE_SECONDS) as limit:
                async for item in relay:
                    limit.reschedule(None)
                    await response.send(item)
                    if isinstance(item, Head) and item.ended:
                        break
        except TimeoutError:
            relay.cancel()
            raise DeadlinePassed("the request was not finished in time") from None
        await response.end()


class _Once:
    """Cancels a relay whose response has not ended: Ray's own cancelling costs a call to the replica."""

    def __init__(self, relay: Relay, response: "_Response") -> None:
        self._relay, self._response = relay, response

    def __call__(self) -> None:
        if not self._response.ended:
            self._relay.cancel()


class _Response:
    """The response to the client."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._is_events = False
        self.begun = self.ended = False

    async def send(self, item: Head | bytes) -> None:
        if isinstance(item, Head):
            self.begun = True
            kind = next((value for name, value in item.headers if name == b"content-type"), b"")
            self._is_events = kind.startswith(_EVENTS)
            start = {"type": "http.response.start", "status": item.status, "headers": list(item.headers)}
            await self._send(start)
            item = item.body
        if item:
            await self._send({"type": "http.response.body", "body": item, "more_body": True})

    async def end(self) -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ServiceError) -> None:
        """Tells the client. A response that has begun and is no stream of events is broken off.

        Raises:
            ServiceError: it is.
        """
        if not self.begun:
            await error_response(error, self._scope)(self._scope, _never, self._send)
        elif self._is_events:
            lost = GenerationFailed(error.message) if isinstance(error, ReplicaLost) else error
            note_refusal(lost, self._scope)
            body = event(error_body(lost, facts_of(self._scope).dialect, request_id(self._scope)))
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await self.end()
        else:
            raise error


async def _never() -> dict[str, str]:
    return await asyncio.Future()
