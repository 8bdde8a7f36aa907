"""The interface that receives finished requests."""

from typing import Protocol

from server.engine.sequence import Timeline


class Observer(Protocol):
    """Implemented by ``Metrics``, and by ``Tracing`` around it."""

    def observe_request(
        self, precision: str, outcome: str, timeline: Timeline, prompt_tokens: int
    ) -> None: ...
