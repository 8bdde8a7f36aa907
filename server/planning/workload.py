"""What is planned for: requests, objectives, and the settings of a replica."""

from dataclasses import dataclass, replace

from server.settings.server import Settings

MILLISECONDS = 1000.0
QUANTILES = (0.5, 0.99)


@dataclass(frozen=True)
class Workload:
    """Poisson arrivals of requests of one shape.

    Args:
        rate: requests a second, of all replicas together.
        prompt, tokens: of each request: read and generated.
    """

    rate: float
    prompt: int
    tokens: int

    def at(self, rate: float) -> "Workload":
        return replace(self, rate=rate)


@dataclass(frozen=True)
class Objectives:
    """Limits of the 99th percentiles, in milliseconds."""

    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True)
class Replica:
    """The settings of one process that decide what waits, and for how long.

    Args:
        slots: sequences decoded together (``MAX_BATCH_SIZE``).
        chunk, busy_chunk: prompt tokens of a step without and with rows that decode.
        places: requests running and waiting; more are refused.
        timeout: seconds of a request, waiting included; what can't be finished before is refused.
    """

    slots: int
    chunk: int = 128
    busy_chunk: int = 16
    places: int = 128
    timeout: float = 300.0

    @classmethod
    def of(cls, settings: Settings, slots: int) -> "Replica":
        return cls(
            slots,
            settings.prefill_chunk,
            min(settings.prefill_chunk, settings.busy_chunk()),
            settings.max_concurrent_requests,
            settings.request_timeout,
        )


@dataclass(frozen=True)
class Frontend:
    """What serving over HTTP adds to the engine's times: measured, see ``server.planning.frontend``.

    Args:
        request_seconds: from a request's first byte to its sequence in the engine; on the cores that compute
            passes, so that the running step ends later by as much.
        step_seconds, token_seconds: by which a step is longer, and for each of its rows.
    """

    request_seconds: float = 0.0
    step_seconds: float = 0.0
    token_seconds: float = 0.0


@dataclass(frozen=True)
class Latencies:
    """Of all requests and tokens of a steady state; seconds. Refused requests have none."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    refused: float = 0.0
    """Share of the requests."""
    rows: float = 0.0
    """Sequences that have their first token and not their last, averaged over time."""

    def meets(self, objectives: Objectives) -> bool:
        """Whether both 99th percentiles are within their limits and no request in a hundred is refused."""
        return (
            self.ttft_p99 * MILLISECONDS <= objectives.ttft_ms
            and self.itl_p99 * MILLISECONDS <= objectives.itl_ms
            and self.refused < 0.01
        )
