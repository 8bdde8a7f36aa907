"""Options that several subcommands have."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices

from server.setting_types import option


class NotSaved(Exception):
    """Figures could not be written to their file; the message says why."""


def _can_be_written(file: Path) -> Path:
    """Looked at before anything is measured, since that may take long."""
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{file.name!r} can't be written there")
    return file


Output = Annotated[Path, AfterValidator(_can_be_written)]


def json_option(group: str, text: str, unset: str) -> Any:
    """``--json FILE``, whose field is ``json_file``: pydantic has a method of the shorter name."""
    names = AliasChoices("json_file", "json")
    return option(None, group, "FILE", text, unset=unset, validation_alias=names)


def save(file: Path | None, text: str) -> None:
    """Writes what ``--json`` asked for, if it did; folders are made.

    Raises:
        NotSaved
    """
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise NotSaved(f"--json: {error.strerror}") from error


def precisions_option(group: str) -> Any:
    """``--precisions NAMES``; None stands for ``loaders.available``."""
    return option(None, group, "NAMES", "by comma", unset="all that this host can run")
