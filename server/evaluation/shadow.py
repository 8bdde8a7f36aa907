"""Quality on real traffic: a fraction of finished requests is replayed through a reference, on idle capacity.

The precision that served a request and the reference both score the generated tokens; metrics record the
divergence of their distributions at each token. An arriving request interrupts a replay within a step.
"""

import asyncio
import logging
import random
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from loaders.quality.divergence import TokenFigures, compare
from server.activity import Activity
from server.concurrency import Interrupted, run_until
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from server.errors import ServiceError
from server.host.threads import run_in_own_thread
from server.observability.metrics import Metrics
from server.service.continuation import Continuation
from server.service.pool import Pool
from server.settings.server import Settings

Outcome = Literal["compared", "dropped", "failed"]
_MOST_WAITING, _MOST_TRIES = 64, 4
_MOST_LOGITS = 2**25  # kept of one request for each of the two precisions: 128 MB
_QUIET, _POLL = 0.25, 0.05  # seconds that the server must have been idle before a replay; between checks
_ROWS = 8  # rows compared between checks for an arrival
_log = logging.getLogger(__name__)


@dataclass
class Request:
    """A finished request as token ids."""

    precision: str
    prompt: list[int]
    generated: list[int]
    tries: int = 0


@dataclass
class Tally:
    """The replays of one precision, summed up."""

    outcomes: dict[Outcome, int] = field(default_factory=lambda: {"compared": 0, "dropped": 0, "failed": 0})
    tokens: int = 0
    agreeing: float = 0.0
    kl: float = 0.0
    max_kl: float = 0.0

    def add(self, figures: TokenFigures) -> None:
        self.tokens += len(figures.kl)
        self.agreeing += float(figures.agrees.sum())
        self.kl += float(figures.kl.sum())
        self.max_kl = max(self.max_kl, float(figures.kl.max()))

    def figures(self) -> dict[str, Any]:
        known = self.tokens > 0
        return {
            "requests": dict(self.outcomes),
            "tokens": self.tokens,
            "agreement": self.agreeing / self.tokens if known else None,
            "mean_kl": self.kl / self.tokens if known else None,
            "max_kl": self.max_kl if known else None,
        }


class Shadow:
    """Event loop only.

    Args:
        reference: the precision that the others are compared with; replays wait until it is loaded.
        activity: replays wait while it is busy.
    """

    def __init__(
        self, reference: str, settings: Settings, pool: Pool, metrics: Metrics, activity: Activity
    ) -> None:
        self.reference, self._fraction, self._chunk = (
            reference,
            settings.shadow_fraction,
            settings.busy_chunk(),
        )
        self._pool, self._metrics, self._activity = pool, metrics, activity
        self._waiting: deque[Request] = deque()
        self._tallies: dict[str, Tally] = {}
        self._arrived = asyncio.Event()
        self._quiet_since = time.monotonic()

    def arrival(self) -> None:
        """Interrupts a running replay, as a request has arrived."""
        self._arrived.set()

    def finished(self, done: Continuation) -> None:
        """Queues a random fraction of the finished requests for a replay."""
        eligible = done.precision != self.reference and bool(done.pieces)
        if not eligible or random.random() >= self._fraction:
            return
        if len(self._waiting) == _MOST_WAITING:
            self._count(self._waiting.popleft(), "dropped")
        generated = [piece.token.id for piece in done.pieces]
        self._waiting.append(Request(done.precision, list(done.prompt_ids), generated))

    def figures(self) -> dict[str, Any]:
        """The figures of ``/stats``."""
        return {
            "reference": self.reference,
            "fraction": self._fraction,
            "waiting": len(self._waiting),
            "precisions": {name: tally.figures() for name, tally in self._tallies.items()},
        }

    async def run(self) -> None:
        """Replays until cancelled."""
        while True:
            await asyncio.sleep(_POLL)
            if not self._activity.is_idle():  # or another model's shadow replays
                self._quiet_since = time.monotonic()
            elif self._waiting and time.monotonic() - self._quiet_since > _QUIET:
                await self._replay(self._waiting.popleft())

    async def _replay(self, request: Request) -> None:
        self._arrived.clear()
        self._activity.replaying = True
        try:
            figures = await run_until(self._arrived.wait(), self._compared(request))
        except Interrupted:
            self._requeue(request)
        except ServiceError:
            self._count(request, "failed")
        except Exception:
            _log.exception("replaying a request of %s failed", request.precision)
            self._count(request, "failed")
        else:
            self._count(request, "failed" if figures is None else "compared", figures)
        finally:
            self._activity.replaying = False

    async def _compared(self, request: Request) -> TokenFigures | None:
        """The divergence at each generated token; None if some logits are not numbers."""
        if any(self._pool.state(name).engine is None for name in (self.reference, request.precision)):
            raise Interrupted  # it is not loaded; another try follows
        expected = await self._logits(self.reference, request)
        found = await self._logits(request.precision, request)
        targets = torch.tensor(request.generated[: len(expected)])
        figures = await asyncio.to_thread(
            run_in_own_thread, lambda: self._figures(expected, found, targets), 1
        )
        return figures if bool(torch.isfinite(figures.kl).all()) else None

    async def _logits(self, precision: str, request: Request) -> Tensor:
        """The logits at each generated token: after the prompt and each token but the last,
        (generated, vocabulary)."""
        async with self._pool.use(precision) as engine:
            return await _scored(engine, request, self._chunk)

    def _figures(self, expected: Tensor, found: Tensor, targets: Tensor) -> TokenFigures:
        parts = []
        for at in range(0, len(targets), _ROWS):
            if self._arrived.is_set():
                raise Interrupted
            rows = slice(at, at + _ROWS)
            parts.append(compare(expected[rows], found[rows], targets[rows]))
        return TokenFigures.joined(parts)

    def _requeue(self, request: Request) -> None:
        """Queues another try, up to ``_MOST_TRIES`` in all."""
        request.tries += 1
        if request.tries >= _MOST_TRIES:
            self._count(request, "dropped")
        else:
            self._waiting.append(request)

    def _count(self, request: Request, outcome: Outcome, figures: TokenFigures | None = None) -> None:
        tally = self._tallies.setdefault(request.precision, Tally())
        tally.outcomes[outcome] += 1
        self._metrics.observe_shadow(request.precision, outcome)
        if figures is not None:
            tally.add(figures)
            self._metrics.observe_drift(request.precision, figures.kl.tolist(), float(figures.agrees.mean()))


async def _scored(engine: Engine, request: Request, chunk: int) -> Tensor:
    most = max(1, _MOST_LOGITS // engine.model.runner.vocabulary)
    generated = request.generated[:most]
    ids, skipped = [*request.prompt, *generated[:-1]], len(request.prompt) - 1
    kept: list[Tensor] = []
    seen = 0

    def observe(logits: Tensor) -> None:
        nonlocal seen
        wanted = logits[max(0, skipped - seen) :]
        seen += len(logits)
        if len(wanted):
            kept.append(wanted.detach().to("cpu", torch.float32, copy=True))

    params = SamplingParams(max_new_tokens=0)
    with closing(engine.generate(ids, params, observe=observe, chunk=chunk)) as tokens:
        async for _ in tokens:
            pass
    return torch.cat(kept)
