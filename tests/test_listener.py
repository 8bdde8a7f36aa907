"""A listening socket that refuses by itself, and accepts so many connections at a time."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from server.early_refusal import EarlyRefusal
from server.listener import Listener
from server.settings import Settings
from tests.test_early_refusal import BODY, Closed
from tests.test_slow_clients import received, request_for, status_of


@contextmanager
def listening() -> Iterator[Listener]:
    with Listener(socket.AF_INET, EarlyRefusal(Closed(), Settings(device="cpu"))) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.setblocking(False)
        yield listener


def accepted(listener: Listener, begun: bytes, count: int = 1) -> tuple[list[bytes], list[bytes]]:
    """Of clients that begin so: what those that were accepted have sent, and what the others were told."""

    async def main() -> tuple[list[bytes], list[bytes]]:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(count)]
        for client in clients:
            client.sendall(begun)
        taken, told = [], []
        for _ in range(count):  # turns
            with suppress(BlockingIOError):
                taken.append(listener.accept()[0])
            await asyncio.sleep(0)
        sent = [connection.recv(65536) for connection in taken]
        for connection in taken:
            connection.close()
        for client in clients:
            told.append(received(client))
            client.close()
        return sent, [one for one in told if one]

    return asyncio.run(main())


def test_a_request_that_is_there_is_refused_by_the_listening_socket() -> None:
    with listening() as listener:
        sent, told = accepted(listener, request_for("/generate", BODY, "Connection: keep-alive"), 30)
    assert not sent
    assert [status_of(one) for one in told] == [429] * 30
    assert all(b"\r\nconnection: close\r\n" in one for one in told)


@pytest.mark.parametrize("missing", [1, 60, 100])
def test_a_connection_whose_request_is_not_whole_is_accepted_with_all_it_sent(missing: int) -> None:
    begun = request_for("/generate", BODY)[:-missing]
    with listening() as listener:
        assert accepted(listener, begun, 3) == ([begun] * 3, [])


def test_in_one_turn_of_the_loop_so_many_are_accepted() -> None:
    async def main() -> list[int]:
        turns = []
        with listening() as listener:
            clients = [socket.create_connection(listener.getsockname()) for _ in range(40)]
            for _ in range(4):
                await asyncio.sleep(0)
                taken = list(accepting(listener))
                turns.append(len(taken))
                for one in [*taken, *clients[: len(taken)]]:
                    one.close()
        return turns

    def accepting(listener: Listener) -> Iterator[socket.socket]:
        with suppress(BlockingIOError):
            while True:
                yield listener.accept()[0]

    assert asyncio.run(main()) == [16, 16, 8, 0]
