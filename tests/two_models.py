"""An app of two models without weights: ``large``, the default one, says a, ``owner/small`` says b."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI

from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from server.app import create_app
from server.served_model import Wanted
from server.settings.server import Settings
from tests.fakes import FakeRunner, fake_checkpoint, fake_model

Runners = dict[tuple[str, str], FakeRunner]
"""By the model's name without its owner, and the precision."""
LARGE, SMALL = 256, 128
"""The models' contexts."""
FIRST = {("large", "fp32"), ("large", "bf16"), ("small", "fp32")}
"""What is loaded at the start."""
_SAYS = {LARGE: ("large", 65), SMALL: ("small", 66)}


def two_models(folder: Path, runners: Runners, small: dict[str, Any] | None = None, **values: Any) -> FastAPI:
    """The app.

    Args:
        runners: gets every runner that is loaded.
        small: settings of the small model alone.
        values: settings of both.
    """

    def load(name: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
        model, said = _SAYS[spec.max_tokens]
        runner = runners[model, name] = FakeRunner(spec.slots, spec.max_tokens)
        runner.next_id = lambda ids: said  # type: ignore[method-assign]
        return fake_model(name, runner)

    settings = Settings(**{"precisions": "fp32,bf16", "device": "cpu", **values})
    of_small = settings.model_copy(update=small or {})
    first = Wanted(lambda: fake_checkpoint(folder / "a", LARGE), settings, name="large")
    other = Wanted(lambda: fake_checkpoint(folder / "b", SMALL), of_small, name="owner/small")
    return create_app(settings, first=first, others=[other], load=load)


def is_ready(app: FastAPI) -> bool:
    """Whether all that is loaded at the start is loaded."""
    pools = {name.rpartition("/")[2]: model.pool for name, model in app.state.models.items()}
    return all(pools[model].state(precision).state == "loaded" for model, precision in FIRST)
