"""While requests are refused, sockets wait for the loop's next wake-up by a thread, for a bounded time."""

import asyncio
import contextlib
import selectors
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from server.http.connection.refusing_selector import RefusingSelector

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="epoll")


class Counted:
    """How many requests have been refused."""

    def __init__(self) -> None:
        self.refused = 0

    def __call__(self) -> int:
        return self.refused


@contextlib.contextmanager
def watched() -> Iterator[tuple[Counted, RefusingSelector, socket.socket, socket.socket]]:
    """A selector, the sending ends of its loop's pipe and of a client."""
    counted, (pipe, wakes), (client, sends) = Counted(), socket.socketpair(), socket.socketpair()
    with pipe, wakes, client, sends, contextlib.closing(RefusingSelector(counted)) as selector:
        selector.register(pipe, selectors.EVENT_READ, "pipe")
        selector.register(client, selectors.EVENT_READ, "client")
        yield counted, selector, wakes, sends


def found(selector: RefusingSelector, timeout: float | None = None) -> set[str]:
    return {key.data for key, _ in selector.select(timeout)}


def test_after_a_refusal_sockets_wait_for_a_thread_to_wake_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.connection.refusing_selector.PAUSE_SECONDS", 60)
    with watched() as (counted, selector, wakes, sends):
        sends.send(b"x")
        counted.refused += 1
        thread = threading.Timer(0.1, wakes.send, [b"w"])
        thread.start()
        assert found(selector) == {"pipe", "client"}
        thread.join()
        assert found(selector) == {"pipe", "client"}  # nothing was refused since: at once
        counted.refused += 1
        assert found(selector, 0) == {"pipe", "client"}  # callbacks are ready: at once


def test_sockets_wait_no_longer_than_the_pause_or_the_next_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched() as (counted, selector, _, sends):
        sends.send(b"x")
        counted.refused += 1
        assert found(selector) == {"client"}
        monkeypatch.setattr("server.http.connection.refusing_selector.PAUSE_SECONDS", 60)
        counted.refused += 1
        assert found(selector, 0.01) == {"client"}


def test_an_event_loop_on_it_serves_sockets_threads_and_timers() -> None:
    counted, events = Counted(), list[str]()

    async def main() -> None:
        loop, ends = asyncio.get_running_loop(), asyncio.Event()
        reader, ours = socket.socketpair()
        with reader, ours:

            def readable() -> None:
                counted.refused += 1
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
            async with asyncio.timeout(10):
                await ends.wait()
            loop.remove_reader(reader)
            thread.join()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(RefusingSelector(counted))) as runner:
        runner.run(main())
    assert {"s", "timer", "thread"} == set(events)
