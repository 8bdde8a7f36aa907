"""While requests are refused, sockets wait for the loop's next wake-ufrom tests.conftest import PATIENCE
p by a thread, for a bounded time."""

import asyncio
import contextlib
import selectors
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from server.http.connection.refusing_selector import RefusingSelector
from tests.conftest import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="epoll")


class Refuses:
    """A service that is full, and how many requests it has refused."""

    def __init__(self) -> None:
        self.refused, self.is_full = 0, True


@contextlib.contextmanager
def watched() -> Iterator[tuple[Refuses, RefusingSelector, socket.socket, socket.socket]]:
    """A selector that has just looked, the sending ends of its loop's pipe and of a client with data."""
    refuses, (pipe, wakes), (client, sends) = Refuses(), socket.socketpair(), socket.socketpair()
    with pipe, wakes, client, sends, contextlib.closing(RefusingSelector(refuses)) as selector:
        selector.register(pipe, selectors.EVENT_READ, "pipe")
        selector.register(client, selectors.EVENT_READ, "client")
        sends.send(b"x")
        assert found(selector) == {"client"}
        yield refuses, selector, wakes, sends


@pytest.fixture
def long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.connection.refusing_selector.PAUSE_SECONDS", 60)


def found(selector: RefusingSelector, timeout: float | None = None) -> set[str]:
    return {key.data for key, _ in selector.select(timeout)}


@pytest.mark.usefixtures("long_pause")
def test_after_a_refusal_threads_wake_the_loop_and_sockets_wait() -> None:
    with watched() as (refuses, selector, wakes, _):
        refuses.refused += 1
        thread = threading.Timer(0.1, wakes.send, [b"w"])
        thread.start()
        assert found(selector) == {"pipe"}
        thread.join()
        assert found(selector, 0) == {"pipe"}


@pytest.mark.usefixtures("long_pause")
def test_timers_run_while_sockets_wait() -> None:
    with watched() as (refuses, selector, _, _):
        refuses.refused += 1
        assert found(selector, 0.01) == set()
        assert found(selector, 0) == set()


@pytest.mark.usefixtures("long_pause")
def test_a_free_place_ends_the_pause() -> None:
    with watched() as (refuses, selector, _, _):
        refuses.refused += 1
        assert found(selector, 0) == set()
        refuses.is_full = False
        assert found(selector, 0) == {"client"}


@pytest.mark.usefixtures("long_pause")
def test_without_a_refusal_since_the_last_look_nothing_waits() -> None:
    with watched() as (refuses, selector, _, _):
        assert found(selector) == {"client"}
        refuses.refused += 1
        assert found(selector, 0) == set()


def test_sockets_wait_no_longer_than_the_pause() -> None:
    with watched() as (refuses, selector, _, _):
        refuses.refused += 1
        assert found(selector) == {"client"}


def test_an_event_loop_on_it_serves_sockets_threads_and_timers() -> None:
    refuses, events = Refuses(), list[str]()

    async def main() -> None:
        loop, ends = asyncio.get_running_loop(), asyncio.Event()
        reader, ours = socket.socketpair()
        with reader, ours:

            def readable() -> None:
                refuses.refused += 1
                events.append(reader.recv(1).decode())
                if len(events) < 4:
                    ours.send(b"s")
                elif "thread" in events and "timer" in events:
                    ends.set()
                else:
                    ours.send(b"s")

            loop.add_reader(reader, readable)
            loop.call_later(0.01, events.append, "timer")
            thread = threading.Timer(0.01, loop.call_soon_threadsafe, (events.append, "thread"))
            thread.start()
            ours.send(b"s")
            async with asyncio.timeout(PATIENCE):
                await ends.wait()
            loop.remove_reader(reader)
            thread.join()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(RefusingSelector(refuses))) as runner:
        runner.run(main())
    assert {"s", "timer", "thread"} == set(events)
