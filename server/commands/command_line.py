"""Shared by the subcommands: settings from a command line, errors as one line."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from inspect import cleandoc
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource

import loaders
from loaders.base import Checkpoint
from loaders.errors import PrecisionUnavailable
from server.commands.help import Arguments, Formatter
from server.settings.errors import in_words
from server.settings.model import ModelSettings
from server.settings.types import ALL, AUTO

USAGE, FAILED = 2, 1
_PRECISIONS_OF = ("precision", "precisions", "shadow_precision")
_Options = TypeVar("_Options", bound=BaseSettings)
_Settings = TypeVar("_Settings", bound=ModelSettings)


class UsageError(Exception):
    """An invalid command line or environment variable, named in the message."""


def parse(options: type[_Options], command: str, arguments: Sequence[str]) -> _Options:
    """Settings from flags, then environment, then defaults. Exits on ``--help`` and on unknown flags.

    Raises:
        UsageError: a value is invalid.
    """
    try:
        return CliApp.run(
            options, cli_args=list(arguments), cli_settings_source=command_line(options, command)
        )
    except ValidationError as error:
        raise UsageError(in_words(options, error)) from None


def of_environment(settings: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Settings that are no options of the command: ``given``, then the environment, then defaults.

    Raises:
        UsageError: a variable is invalid.
    """
    try:
        return settings(**given)
    except ValidationError as error:
        raise UsageError(in_words(settings, error)) from None


def command_line(options: type[BaseSettings], command: str) -> CliSettingsSource[Any]:
    """The parser of a command's options."""
    shown = Arguments(options.model_fields)
    source: CliSettingsSource[Any] = CliSettingsSource(
        options,
        cli_prog_name=f"bitdial {command}",
        add_argument_method=shown.add,
        formatter_class=Formatter,
    )
    parser = source.root_parser
    parser.usage = " ".join([f"bitdial {command} [OPTIONS]", *shown.positional])
    parser.description = cleandoc(options.__doc__ or "")
    return source


def require(precisions: Iterable[str], device: Literal["cpu", "cuda"]) -> None:
    """Checks, before anything is loaded, that this host can run the precisions.

    Raises:
        UsageError: with the reason, and the install command if there is one.
    """
    for name in precisions:
        able = loaders.availability(name, device)
        if not able.ok:
            raise UsageError(str(PrecisionUnavailable(name, able)))


def for_saved(options: _Settings, checkpoint: Checkpoint, *, beside_others: bool = False) -> _Settings:
    """The settings for a checkpoint that is quantized already: its precision is the default and the only one.

    Args:
        beside_others: it is one of several models, for which the settings may name other precisions.

    Raises:
        UsageError: they name another.
    """
    saved = checkpoint.saved
    if saved is None:
        return options
    here: dict[str, Any] = {"precision": saved, "precisions": (saved,)}
    if beside_others:
        here["shadow_precision"] = None  # its reference is another precision of the same model
        return _updated(options, here)
    given = [getattr(options, name) for name in _PRECISIONS_OF if name in options.model_fields_set]
    for value in given:
        names = value if isinstance(value, tuple) else (value,)
        if others := [name for name in names if name not in (saved, ALL, AUTO, None)]:
            raise UsageError(
                f"{checkpoint.model_id} is saved in {saved}; for {others[0]} name the model it was made from"
            )
    return _updated(options, here)


def _updated(options: _Settings, values: dict[str, Any]) -> _Settings:
    known = {name: value for name, value in values.items() if name in type(options).model_fields}
    return options.model_copy(update=known)


def complain(command: str, error: Exception) -> None:
    print(f"bitdial {command}: {error}", file=sys.stderr)
