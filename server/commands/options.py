"""Options that several subcommands have."""

from typing import Any

from pydantic import AliasChoices

from server.setting_types import option


def json_option(group: str, text: str, unset: str) -> Any:
    """``--json FILE``, whose field is ``json_file``: pydantic has a method of the shorter name."""
    names = AliasChoices("json_file", "json")
    return option(None, group, "FILE", text, unset=unset, validation_alias=names)


def precisions_option(group: str) -> Any:
    """``--precisions NAMES``; None stands for ``loaders.available``."""
    return option(None, group, "NAMES", "by comma", unset="all that this host can run")
