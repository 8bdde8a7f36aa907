"""What is wrong with settings, in words."""

from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from server.settings.model import has_variable


def in_words(settings: type[BaseSettings], error: ValidationError) -> str:
    """The first error of each setting, named as an option and as a variable."""
    first = {(one["loc"] or ("",))[0]: dict(one) for one in reversed(error.errors())}
    return "; ".join(_readable(settings, one) for one in reversed(first.values()))


def _readable(settings: type[BaseSettings], error: dict[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "the command line"
    flag = f"--{name.replace('_', '-')}" if error["loc"] else name
    if error["loc"] and has_variable(settings, name):
        flag += f" (or {name.upper()})"
    if error["type"] == "missing":
        positional = settings.model_fields[name].json_schema_extra is None
        return f"{name.upper() if positional else flag} is missing or empty"
    return f"{flag}: {str(error['msg']).removeprefix('Value error, ')}"
