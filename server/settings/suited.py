"""Which of a command's precisions can be made of its checkpoint."""

from typing import TypeVar

import loaders
from loaders.base import ModelSpec
from loaders.errors import PrecisionUnavailable
from server.settings.model import ModelSettings
from server.settings.types import ALL, listed

_Settings = TypeVar("_Settings", bound=ModelSettings)


def for_suited(options: _Settings, spec: ModelSpec) -> _Settings:
    """The settings whose ``precisions``, where they name none themselves, can all be made of the checkpoint.

    Raises:
        PrecisionUnavailable: they name one that can't be, with the reason.
    """
    given = getattr(options, "precisions", None)
    able = {name: loaders.suitability(name, spec) for name in listed(given, spec.device)}
    if given in (None, ALL, ()):
        suited = tuple(name for name in able if able[name].ok)
        return options.model_copy(update={"precisions": suited})
    for name in able:
        if not able[name].ok:
            raise PrecisionUnavailable(name, able[name])
    return options
