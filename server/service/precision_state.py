"""What is known of one precision while the server runs."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal

import loaders
from loaders.errors import UnknownPrecision
from server.engine.engine import Engine
from server.errors import BadPrecision, Unavailable
from server.settings.types import AUTO

State = Literal["unloaded", "loading", "loaded", "failed", "unavailable"]


@dataclass(frozen=True)
class LoadProgress:
    """How far a load has come; total 0 where it isn't known."""

    stage: str
    current: int
    total: int


@dataclass
class PrecisionState:
    """One precision of the registry as it stands now."""

    name: str
    state: State = "unloaded"
    reason: str | None = None
    install: str | None = None
    engine: Engine | None = None
    load_seconds: float | None = None
    progress: LoadProgress = field(default_factory=lambda: LoadProgress("waiting", 0, 0))
    users: int = 0
    failed_at: float = 0.0

    def refusal(self) -> Unavailable:
        """What to raise where the precision can't run here."""
        mend = f" (mend it with: {self.install})" if self.install else ""
        return Unavailable(f"{self.name} can't run on this host: {self.reason}{mend}")


class Lease(AbstractAsyncContextManager[Engine]):
    """The use of one precision's engine, which is not unloaded as idle meanwhile.

    Entering waits until the engine is loaded; releasing never waits, so that no cancellation can keep it
    from its end.

    Args:
        state: the precision, whose users are counted.
        loaded: loads it where it is not.
    """

    def __init__(self, state: PrecisionState, loaded: Callable[[PrecisionState], Awaitable[Engine]]) -> None:
        self._state, self._loaded, self._held = state, loaded, False

    async def __aenter__(self) -> Engine:
        """The engine.

        Raises:
            ServiceError: it can't be had; nothing is held then.
        """
        self._held = True
        self._state.users += 1
        try:
            return self._state.engine or await self._loaded(self._state)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Any number of times."""
        if self._held:
            self._held = False
            self._state.users -= 1

    async def __aexit__(self, *_: object) -> None:
        self.release()


def known_precision(name: object) -> str:
    """The registry's name of a precision or alias.

    Raises:
        BadPrecision: neither; the message lists the choices.
    """
    if name == AUTO:
        raise BadPrecision("precision 'auto' is not offered here; name one")
    try:
        return loaders.canonical(name)
    except UnknownPrecision as error:
        raise BadPrecision(str(error).encode("ascii", "backslashreplace").decode()) from None
