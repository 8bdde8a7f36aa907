"""What is known of one precision while the server runs."""

from dataclasses import dataclass, field
from typing import Literal

from server.engine import Engine
from server.errors import Unavailable

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
