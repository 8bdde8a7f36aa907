"""Accepting connections: what is refused on accept, and how many are accepted at a time."""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest
from fastapi import FastAPI

from server.http.admission.promised_places import Promise, PromisedPlaces
from server.http.connection.early_refusal import EarlyRefusal
from server.http.connection.listening import Acceptor
from server.http.connection.new_connection import NewConnection
from server.http.connection.open_connections import OpenConnections
from server.settings.server import Settings
from tests.conftest import serving
from tests.http.connection.test_early_refusal import BODY, Closed, answer
from tests.http.connection.test_slow_clients import HEAD, connected, request_for, status_of
from tests.routes.test_generate import greedy


class Seen(asyncio.Protocol):
    """Records the promise and the received bytes of an accepted connection."""

    def __init__(self, accepted: NewConnection) -> None:
        self.promise, self.data = accepted.promise, accepted.begun

    def data_received(self, data: bytes) -> None:
        self.data += data


async def accepting(
    admission: Any, begun: bytes, count: int, make: Callable[[NewConnection], asyncio.Protocol]
) -> tuple[list[bytes], list[int]]:
    """The responses to clients that send this, and the open files per event loop iteration."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        acceptor = Acceptor(
            listener, make, OpenConnections(100), EarlyRefusal(admission, Settings(device="cpu"))
        )
        acceptor.start()
        clients = [socket.create_connection(listener.getsockname()) for _ in range(count)]
        for client in clients:
            client.sendall(begun)
        opened: list[int] = []
        for _ in range(12):
            before = len(psutil.Process().net_connections("tcp"))
            await asyncio.sleep(0)
            opened.append(len(psutil.Process().net_connections("tcp")) - before)
        acceptor.close()
        await acceptor.wait_closed()
        responses = []
        for client in clients:
            client.setblocking(False)
            with suppress(BlockingIOError, ConnectionResetError):
                responses.append(client.recv(65536))
            client.close()
        return responses, opened


def test_a_complete_request_is_refused_as_its_connection_is_accepted() -> None:
    made: list[Seen] = []

    def make(accepted: NewConnection) -> Seen:
        made.append(Seen(accepted))
        return made[-1]

    whole = request_for("/generate", BODY, "Connection: keep-alive")
    responses, _ = asyncio.run(accepting(Closed(), whole, 30, make))
    assert not made
    assert [status_of(one) for one in responses] == [429] * 30
    assert all(b"\r\nconnection: close\r\n" in one for one in responses)


@pytest.mark.parametrize("missing", [1, 60, 100])
def test_a_connection_with_a_partial_request_is_accepted_with_its_bytes(missing: int) -> None:
    made: list[Seen] = []

    def make(accepted: NewConnection) -> Seen:
        made.append(Seen(accepted))
        return made[-1]

    begun = request_for("/generate", BODY)[:-missing]
    responses, _ = asyncio.run(accepting(Closed(), begun, 3, make))
    assert responses == []
    assert [(one.data, one.promise) for one in made] == [(begun, None)] * 3


def test_accepts_per_event_loop_iteration_are_bounded() -> None:
    begun = request_for("/generate", BODY)[:-1]
    _, opened = asyncio.run(accepting(Closed(), begun, 40, Seen))
    assert [count for count in opened if count] == [16, 16, 8]


def test_a_connection_that_fails_to_open_releases_its_promise() -> None:
    places = PromisedPlaces()
    promised: list[Promise | None] = []

    class Open(Closed):
        def judge(self, scope: Any, body_bytes: int, is_whole: bool) -> Promise:
            return places.promise()

    def fails(accepted: NewConnection) -> asyncio.Protocol:
        promised.append(accepted.promise)
        raise RuntimeError("no protocol")

    asyncio.run(accepting(Open(), request_for("/generate", BODY), 2, fails))
    assert [isinstance(one, Promise) for one in promised] == [True, True]
    assert places.count == 0


@pytest.mark.parametrize("size", [16 * 1024, 16 * 1024 + 1, 300_000])
def test_a_first_request_of_any_size_arrives_whole(make_app: Callable[..., FastAPI], size: int) -> None:
    """Its first bytes are read as the connection is accepted, the others by the event loop."""
    body = json.dumps(BODY).encode()
    head = HEAD + b"Content-Length: %d\r\n\r\n"
    padded = body.ljust(size - len(head % size))
    with serving(make_app()) as address, connected(address) as connection:
        connection.sendall(head % len(padded) + padded)
        status, said = answer(connection)
        assert (status_of(status), said["generated_text"]) == (200, greedy(5))
        connection.sendall(request_for("/generate", BODY))
        assert status_of(answer(connection)[0]) == 200
