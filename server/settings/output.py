"""Options shared by several subcommands."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices

from server.host.cache import check_room
from server.settings.types import option


class NotSaved(Exception):
    """Figures could not be written to their file; the message says why."""


def _file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path.name!r} is a folder")
    if path.exists() and not path.is_file():
        return path  # a device or a pipe, such as a shell's >(…)
    return _writable(path, path.absolute().parent)


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path.name!r} is no folder")
    return _writable(path, path)


def _writable(path: Path, folder: Path) -> Path:
    try:
        check_room(folder)
    except OSError as error:
        raise ValueError(f"{path.name!r} can't be written there: {error.strerror}") from None
    return path


Output = Annotated[Path, AfterValidator(_file)]
"""A file that can be written; checked before anything is measured."""
OutputFolder = Annotated[Path, AfterValidator(_folder)]
"""A folder that can be written; it need not exist yet."""


def json_option(group: str, text: str, unset: str) -> Any:
    """``--json FILE``; its field is ``json_file``, since pydantic has a method ``json``."""
    names = AliasChoices("json_file", "json")
    return option(None, group, "FILE", text, unset=unset, validation_alias=names)


def save(file: Path | None, text: str, option: str = "--json") -> None:
    """Writes ``text`` to the file of an option, if one was given; creates its folder.

    Raises:
        NotSaved
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise NotSaved(f"{option}: {error.strerror}") from error


def precisions_option(group: str) -> Any:
    """``--precisions NAMES``; None stands for ``loaders.direct``."""
    return option(None, group, "NAMES", "by comma, or all", unset="those that need no files made first")
