"""``bitdial completion``: a script that completes commands, options and precisions in a shell."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

import shtab
from pydantic.fields import FieldInfo

import loaders
from server.commands import COMMANDS
from server.commands.command_line import USAGE, UsageError, command_line, complain
from server.commands.completed_list import completed_list
from server.settings.types import ALL, AUTO

_HELP = """usage: bitdial completion SHELL

Print a script that completes bitdial's commands, options and precisions.
SHELL is {shells}.

  bash   eval "$(bitdial completion bash)"    in ~/.bashrc
  zsh    bitdial completion zsh > FOLDER/_bitdial    a folder of $fpath
  fish   bitdial completion fish > ~/.config/fish/completions/bitdial.fish
"""
_ONE_PRECISION = ("precision", "reference", "shadow_precision")
_PRECISIONS = ("precisions", "layers")
_FILES = ("FILE", "FILES")


def main(arguments: Sequence[str]) -> int:
    *first, last = shtab.SUPPORTED_SHELLS
    shells = f"{', '.join(first)} or {last}"
    if {"-h", "--help"} & set(arguments):
        print(_HELP.format(shells=shells), end="")
        return 0
    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        complain("completion", UsageError(f"name your shell: {shells}"))
        return USAGE
    print(shtab.complete(_parser(arguments[0]), arguments[0]))
    return 0


def _parser(shell: str) -> argparse.ArgumentParser:
    """One parser of all commands, as shtab wants it."""
    parser = argparse.ArgumentParser("bitdial")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, what in COMMANDS.items():
        if name == "completion":
            commands.add_parser(name, help=what).add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
            continue
        options = import_module(f"server.commands.{name}").Options
        own = command_line(options, name).root_parser
        for action in own._actions:
            _complete(action, name, options.model_fields.get(action.dest), shell)
        commands.add_parser(name, help=what, parents=[own], add_help=False)
    return parser


def _complete(action: argparse.Action, command: str, field: FieldInfo | None, shell: str) -> None:
    """Adds what may follow an option."""
    if action.dest in _ONE_PRECISION:
        action.choices = [*loaders.PRECISIONS, *([AUTO] if command == "serve" else [])]
    elif action.dest in _PRECISIONS:
        if (completer := completed_list(tuple(loaders.PRECISIONS), ALL, shell)) is not None:
            action.complete = completer  # type: ignore[attr-defined]  # as shtab documents it
        else:
            action.choices = [*loaders.PRECISIONS, ALL]
    elif action.dest == "method":
        action.choices = [name for name in loaders.PRECISIONS if loaders.maker(name) is not None]
    elif choices := _literals(None if field is None else field.annotation):
        action.choices = choices
    elif action.metavar in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.metavar == "FOLDER":
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _literals(annotation: Any) -> list[str]:
    """The values of a ``Literal``, optional or not."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for one in get_args(annotation) for value in _literals(one)]
