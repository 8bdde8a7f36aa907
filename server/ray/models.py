"""The models that a replica serves."""

from functools import partial

from loaders.checkpoint import open_checkpoint
from server.report.choice import Choice
from server.served_model import Wanted
from server.settings.models import sources_of
from server.settings.server import Settings


def wanted(settings: Settings, choice: Choice | None) -> list[Wanted]:
    """The models of the settings, the default one first; each has the replica's precision at the start.

    Args:
        choice: why the report chose the default model's precision, if it did.

    Raises:
        ValueError: settings contradict each other.
    """
    return [
        Wanted(
            partial(open_checkpoint, source.source, source.revision),
            source.settings(settings),
            choice if index == 0 else None,
            source.name,
        )
        for index, source in enumerate(sources_of(settings))
    ]
