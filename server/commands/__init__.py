"""What the subcommands share: settings from a command line, progress on a terminal, errors as one line."""

import sys
from collections.abc import Sequence
from inspect import cleandoc
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp
from tqdm import tqdm

USAGE, FAILED = 2, 1
_Options = TypeVar("_Options", bound=BaseModel)


class UsageError(Exception):
    """A command line or an environment variable that doesn't fit; the message says which."""


def parse(options: type[_Options], command: str, arguments: Sequence[str]) -> _Options:
    """Flags before environment before defaults. Ends the process on ``--help`` and on unknown flags."""
    cast(dict[str, Any], options.model_config)["cli_prog_name"] = f"bitdial {command}"
    options.__doc__ = cleandoc(options.__doc__ or "")
    try:
        return CliApp.run(options, cli_args=list(arguments))
    except ValidationError as error:
        raise UsageError("; ".join(_readable(dict(one)) for one in error.errors())) from None


def _readable(error: dict[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "the command line"
    flag = f"--{name.replace('_', '-')} (or {name.upper()})" if error["loc"] else name
    return f"{flag}: {str(error['msg']).removeprefix('Value error, ')}"


def complain(command: str, error: Exception) -> None:
    print(f"bitdial {command}: {error}", file=sys.stderr)


class ProgressBars:
    """A ``loaders`` progress callback: one bar a stage on a terminal, one line a stage elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage: str | None = None
        self._bar: Any = None

    def __call__(self, stage: str, current: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage = stage
            if sys.stderr.isatty():
                self._bar = tqdm(total=total or None, desc=f"{self._title}: {stage}", leave=False)
            else:
                print(f"{self._title}: {stage} …", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.total = total or None
            self._bar.n = current
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
