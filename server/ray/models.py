"""The models that a replica serves."""

from functools import partial

from loaders.checkpoint import open_checkpoint
from server.report.choice import Choice
from server.served_model import Wanted
from server.settings.server import Settings
from server.settings.types import ModelSource, model_sources


def wanted(settings: Settings, choice: Choice | None) -> list[Wanted]:
    """The models of the settings, the default one first; each has the replica's precision at the start.

    Args:
        choice: why the report chose the default model's precision, if it did.
    """
    sources = model_sources(settings.models) if settings.models else [ModelSource(settings.model_id, None)]
    return [
        Wanted(
            partial(open_checkpoint, source.source, settings.revision),
            settings.model_copy(update={"model_id": source.source}),
            choice if index == 0 else None,
            source.name,
        )
        for index, source in enumerate(sources)
    ]
