"""The arguments of the application, and the error for those that are not valid: one line, also below Ray."""

from collections.abc import Mapping
from typing import Annotated, Any

from click import ClickException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray.serve.exceptions import RayServeException

from server.settings.server import Settings

_ALLOWED = "allowed"


class InvalidApplication(RayServeException, ClickException, ValueError):
    """The application can't be built as asked.

    Of these classes alone Ray shows the message without a traceback: ``serve run IMPORT_PATH`` ends by a
    ``ClickException``, and a deployed file's status has the text of a ``RayServeException``.
    """


def _assignable(count: float) -> float:
    if round(count, 4) != count:
        raise ValueError
    return count


def _assignable_cards(count: float) -> float:
    if count > 1 and count != int(count):
        raise ValueError
    return _assignable(count)


def _argument(default: Any, description: str, allowed: str, **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={_ALLOWED: allowed}, **bounds)


class Arguments(BaseModel):
    """Arguments of the application: ``serve run server.ray_app:app replicas=2``, or ``args:`` in a file.

    Options of one deployment, named like its precision, go under ``deployments:`` in a file.
    """

    model_config = ConfigDict(extra="forbid")

    replicas: int = _argument(1, "of each precision", "a whole number, 1 or more", ge=1)
    max_replicas: int | None = _argument(
        None,
        "with more than `replicas` it scales by load",
        "a whole number, no less than replicas",
        ge=1,
    )
    num_cpus: Annotated[float, AfterValidator(_assignable)] = _argument(
        1.0,
        "of a replica; whole ones are its threads, unless set",
        "0 or more, with four decimals at most",
        ge=0,
        allow_inf_nan=False,
    )
    num_gpus: Annotated[float, AfterValidator(_assignable_cards)] = _argument(
        0.0,
        "of a replica; below 1 it takes that share of a card",
        "a share of a card from 0 to 1, with four decimals at most, or a whole number of cards",
        ge=0,
        allow_inf_nan=False,
    )
    affinity: bool = _argument(
        False,
        "prompts with the same beginning go to the same replica, if it has room",
        "true or false",
    )
    user_config: dict[str, Any] = Field(
        default_factory=dict,
        description="settings that replicas take over without being replaced",
        json_schema_extra={_ALLOWED: "settings of docs/settings.md and their values, in a file"},
    )

    @model_validator(mode="after")
    def _at_most_no_less(self) -> "Arguments":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: {self.replicas} (replicas) or more, not {self.max_replicas}")
        return self


def parse(given: Mapping[str, Any]) -> Arguments:
    """The arguments as ``serve run`` or a file gives them.

    Raises:
        InvalidApplication: names each wrong argument and what it may be.
    """
    try:
        return Arguments.model_validate(dict(given))
    except ValidationError as error:
        found = {one["loc"][:1]: _readable(dict(one)) for one in reversed(error.errors())}
        raise InvalidApplication("; ".join(reversed(found.values()))) from None


def _readable(error: Mapping[str, Any]) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = error["loc"][0]
    if error["type"] == "extra_forbidden":
        *names, last = Arguments.model_fields
        if str(name).lower() in Settings.model_fields:
            return f"{name} is no argument but a setting: set the variable {str(name).upper()}"
        return f"unknown argument {_short(name)}; there are {', '.join(names)} and {last}"
    allowed = Arguments.model_fields[str(name)].json_schema_extra
    assert isinstance(allowed, dict)
    return f"{name}: {allowed[_ALLOWED]}, not {_short(error['input'])}"


def _short(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
