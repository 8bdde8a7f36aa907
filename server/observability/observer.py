"""Who is told of requests that have ended."""

from typing import Protocol

from server.engine.sequence import Timeline


class Observer(Protocol):
    """What is needed of ``server.observability.metrics.Metrics``."""

    def observe_request(
        self, precision: str, outcome: str, timeline: Timeline, prompt_tokens: int
    ) -> None: ...
