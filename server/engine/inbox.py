"""What the event loop tells the worker's thread: new sequences, cancellations, and to stop."""

import queue

from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

_BLOCKED_SECONDS = 0.01  # between two tries to admit a sequence while nothing runs


class Inbox:
    """Messages in the order of their calls."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[str, Sequence] | None] = queue.SimpleQueue()

    def add(self, sequence: Sequence) -> None:
        self._messages.put(("add", sequence))

    def cancel(self, sequence: Sequence) -> None:
        self._messages.put(("cancel", sequence))

    def stop(self) -> None:
        self._messages.put(None)

    def receive(self, scheduler: Scheduler, blocked: bool) -> bool:
        """Empties the inbox, waiting for a message if there is no work; returns False after ``stop``.

        Args:
            scheduler: gets the sequences.
            blocked: the last step computed nothing. If sequences wait, they wait for blocks that another
                precision's sequences hold, or for their deadline.
        """
        block = blocked or not scheduler.has_work
        timeout = _BLOCKED_SECONDS if scheduler.has_work else None
        while True:
            try:
                message = self._messages.get(block, timeout)
            except queue.Empty:
                return True
            if message is None:
                return False
            kind, sequence = message
            if kind == "add":
                scheduler.add(sequence)
            else:
                sequence.cancelled = True
            block = False
