"""Validation of request bodies: pydantic's errors as ``Invalid``, which names the field and the rule."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from server.errors import Invalid
from server.settings.server import Settings


class Strict(BaseModel):
    """A model without conversions, unknown fields or infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


Body = TypeVar("Body", bound=Strict)


def validate(model: type[Body], values: dict[str, Any], settings: Settings, vocabulary: int = 0) -> Body:
    """``values`` as a validated ``model``.

    Raises:
        Invalid: names the field and the rule, never the value.
    """
    for name in values:  # before pydantic, which would report each of a hundred thousand
        if name not in model.model_fields:
            raise _unknown(printable(name))
    try:
        return model.model_validate(values, context={"settings": settings, "vocabulary": vocabulary})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(printable(str(part)) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        raise _unknown(str(field))
    message = first["msg"].removeprefix("Value error, ")
    raise Invalid(f"{field}: {message}" if field else message, param=field)


def _unknown(field: str) -> Invalid:
    return Invalid(f"unknown field {field!r}", param=field)


def printable(name: str) -> str:
    """A client's field name, cut and escaped for an error message."""
    return name[:40].encode("ascii", "backslashreplace").decode()
