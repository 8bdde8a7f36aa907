"""The state of one precision: whether it is loaded, its engine, and the leases of it."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal

import loaders
from loaders.base import Availability, LoadedModel
from loaders.errors import UnknownPrecision
from loaders.runner import ReportingRunner
from server.engine.engine import Engine
from server.errors import BadPrecision, NotLoaded, NotReady, Unavailable
from server.settings.types import AUTO

State = Literal["unloaded", "loading", "loaded", "failed", "unavailable"]


@dataclass(frozen=True)
class LoadProgress:
    """Progress of a load; ``total`` is 0 if it is unknown."""

    stage: str
    current: int
    total: int


@dataclass
class PrecisionState:
    """One precision of the registry."""

    name: str
    state: State = "unloaded"
    reason: str | None = None
    install: str | None = None
    engine: Engine | None = None
    load_seconds: float | None = None
    progress: LoadProgress = field(default_factory=lambda: LoadProgress("waiting", 0, 0))
    users: int = 0
    failed_at: float = 0.0
    promised: bool = False
    """Whether the settings have it loaded at the start."""

    def refusal(self) -> Unavailable:
        """The error for requests of a precision that this host can't run."""
        mend = f" (mend it with: {self.install})" if self.install else ""
        return Unavailable(f"{self.name} can't be served here: {self.reason}{mend}")

    def failure(self, message: str, retry_after: float | None = None) -> NotReady:
        """The error for requests of a precision that could not be loaded; metrics tell a promised one."""
        return (NotReady if self.promised else NotLoaded)(message, retry_after=retry_after)


def first_state(name: str, able: Availability, promised: bool) -> PrecisionState:
    """``unloaded``, or ``unavailable`` with the reason where this host can't run it."""
    if able.ok:
        return PrecisionState(name, promised=promised)
    return PrecisionState(name, "unavailable", able.reason, able.install)


class Lease(AbstractAsyncContextManager[Engine]):
    """The use of one precision's engine, which is not unloaded as idle while it is held.

    Args:
        state: the precision; counts its users.
        loaded: returns the engine once it is loaded.
    """

    def __init__(self, state: PrecisionState, loaded: Callable[[PrecisionState], Awaitable[Engine]]) -> None:
        self._state, self._loaded, self._held = state, loaded, False

    async def acquire(self) -> Engine:
        """The engine, once it is loaded.

        Raises:
            ServiceError: it can't be loaded; nothing is held then.
        """
        self._held = True
        self._state.users += 1
        try:
            return self._state.engine or await self._loaded(self._state)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives the engine back. It never awaits, so that no cancellation can interrupt it; any number of
        calls."""
        if self._held:
            self._held = False
            self._state.users -= 1

    async def __aenter__(self) -> Engine:
        """As ``acquire``."""
        return await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()


def known_precision(name: object) -> str:
    """The registry's name of a precision or alias.

    Raises:
        BadPrecision: neither, with the choices in its message; or ``AUTO``.
    """
    if name == AUTO:
        raise BadPrecision("precision 'auto' is not offered here; name one")
    try:
        return loaders.canonical(name)
    except UnknownPrecision as error:
        raise BadPrecision(str(error).encode("ascii", "backslashreplace").decode()) from None


def forward_pass(model: LoadedModel) -> str:
    """For the log: which forward pass computes the model and, if not the fastest, why."""
    report = model.runner.report() if isinstance(model.runner, ReportingRunner) else {}
    name = report.get("forward", type(model.runner).__name__)
    reasons = ("not_batched_because", "not_compiled_because", "not_captured_because")
    why = next((report[key] for key in reasons if report.get(key)), None)
    return f"{name}, since {why}" if why else str(name)
