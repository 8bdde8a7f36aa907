"""The models of a server: where each is, its revision, its name and its chat template."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import loaders
from loaders.errors import UnknownPrecision
from loaders.model_id import is_hub_id, own_name, split_revision

if TYPE_CHECKING:
    from server.settings.server import Settings

_FORM = "it must be models by comma, such as openai-community/gpt2@main,mine=./folder"


@dataclass(frozen=True)
class ModelSource:
    """One model to serve."""

    source: str
    """As ``MODEL_ID``."""
    name: str | None = None
    """None: the checkpoint's own."""
    revision: str | None = None
    chat_template: Path | None = None
    """None: the model's own."""

    def settings(self, server: "Settings") -> "Settings":
        """The server's settings for this model."""
        here = {"model_id": self.source, "revision": self.revision, "chat_template": self.chat_template}
        return server.model_copy(update=here)


def sources_of(settings: "Settings") -> list[ModelSource]:
    """The models of a server's settings, the default one first; of several each has a name.

    Raises:
        ValueError: settings contradict each other, or two models have one name.
    """
    if settings.models is None:
        return [ModelSource(settings.model_id, None, settings.revision, settings.chat_template)]
    if settings.revision is not None:
        raise ValueError(
            "--revision (or REVISION) is of one model: in --models (or MODELS) write owner/name@revision"
        )
    try:
        found = named_sources(settings.models)
    except ValueError as error:
        raise ValueError(f"--models (or MODELS): {error}") from None
    names = [str(one.name) for one in found]
    if settings.chat_template is None:
        return found
    templates = _chat_templates(str(settings.chat_template), names)
    return [replace(one, chat_template=templates.get(str(one.name))) for one in found]


def named_sources(text: str) -> list[ModelSource]:
    """As ``model_sources``, each with a name: its own if it is given no other.

    Raises:
        ValueError: two models have one name, or one would be another in some precision.
    """
    found = [replace(one, name=one.name or own_name(one.source)) for one in model_sources(text)]
    _check_names([str(one.name) for one in found])
    return found


def model_sources(text: str) -> list[ModelSource]:
    """``"gpt2@main,mine=folder"`` → gpt2 by its own name in that revision, the folder's model as ``mine``.

    Raises:
        ValueError: an entry is empty, or a name is given twice or can't be one.
    """
    found = [_source(entry) for entry in text.split(",")]
    names = [one.name for one in found if one.name]
    if len(set(names)) < len(names):
        raise ValueError("a name is given twice")
    return found


def _source(entry: str) -> ModelSource:
    name, equals, source = (part.strip() for part in entry.partition("="))
    if not equals:
        name, source = "", name
    elif not is_hub_id(name) or not name.isascii():
        raise ValueError(
            f"{name[:100]!r} is no name: letters, digits, '.', '-' and '_', and one '/' after an owner"
            if name
            else _FORM
        )
    source, revision = split_revision(source)
    if not source or revision == "":
        raise ValueError(_FORM)
    return ModelSource(source, name or None, revision)


def _check_names(names: Sequence[str]) -> None:
    """Raises: ValueError, if a request could not tell two models apart by their names."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two models are named {twice[0]}: give one another name, as in other=…")
    for name in names:
        base, _, ending = name.rpartition(":")
        if base in names and _is_precision(ending):
            raise ValueError(
                f"{name} would be {base} in the precision {ending}: give one another name, as in other=…"
            )


def _is_precision(name: str) -> bool:
    try:
        loaders.canonical(name)
    except UnknownPrecision:
        return False
    return True


def _chat_templates(text: str, names: Sequence[str]) -> dict[str, Path]:
    """``"mine=chat.jinja"`` → the file by the model's name.

    Raises:
        ValueError: no file for a model's name, no such model, or one named twice.
    """
    found: dict[str, Path] = {}
    for entry in text.split(","):
        name, equals, file = (part.strip() for part in entry.partition("="))
        if not equals or not file:
            raise ValueError(
                "--chat-template (or CHAT_TEMPLATE): with --models (or MODELS) it must be name=FILE, by comma"
            )
        if name not in names or name in found:
            fault = f"two files for {name}" if name in found else f"no model is named {name[:100]!r}"
            raise ValueError(
                f"--chat-template (or CHAT_TEMPLATE): {fault}; the models are {', '.join(names)}"
            )
        found[name] = Path(file)
    return found


def several_models(text: str | None) -> str | None:
    """The text, if ``model_sources`` can read it."""
    if text is not None:
        model_sources(text)
    return text
