"""Types of settings: a size, names, a precision, an address, a key; and their display in ``--help``."""

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

import loaders

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LATIN_1 = 0xFF
AUTO = "auto"
"""In place of a precision's name: chosen by the stored report."""
ALL = "all"
"""In place of precisions' names: those of ``loaders.direct``, since others may take minutes to make."""


def parse_bytes(value: Any) -> Any:
    """``"12GiB"``, ``"500 MB"`` or a plain number → bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{value!r} is not a size such as 2000000, 500MB or 12GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_names(value: Any) -> Any:
    """``"fp32, int8"`` → ``("fp32", "int8")``."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def parse_endpoint(value: Any) -> Any:
    """A collector's address for traces; without a path, OTLP's is added, which leads to that of metrics."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except (TypeError, ValueError, AttributeError):
        usable = False
    if not usable:
        raise ValueError("it must be an address such as http://collector:4318")
    return value if parts.path.strip("/") else parts._replace(path="/v1/traces").geturl()


def sendable_key(value: SecretStr) -> SecretStr:
    """A key that a client can send in a header. Any other would reject every client without a reason."""
    key = value.get_secret_value()
    if not key.strip():
        raise ValueError("it is blank; leave it out for a server without a key")
    if any(unicodedata.category(character) == "Cc" for character in key):
        raise ValueError("it has a line break or another control character, which no header can carry")
    if key != key.strip():
        raise ValueError("it begins or ends with a space, which no header keeps")
    if any(ord(character) > _LATIN_1 for character in key):
        raise ValueError("it has characters beyond Latin-1, which no header can carry")
    return value


def existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path.name[:200]!r} is not a file")
    return path


def known_or_auto(value: Any) -> Any:
    """As ``loaders.canonical``, or ``AUTO``."""
    return value if value == AUTO else loaders.canonical(value)


def parse_names_or_all(value: Any) -> Any:
    """As ``parse_names``; ``ALL`` by itself is returned as it is."""
    names = parse_names(value)
    return ALL if names in ((ALL,), [ALL]) else names


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Precision = Annotated[str, BeforeValidator(loaders.canonical)]
PrecisionOrAuto = Annotated[str, BeforeValidator(known_or_auto)]
Precisions = Annotated[tuple[Precision, ...] | str, BeforeValidator(parse_names_or_all)]
"""Canonical names, or ``ALL``."""
TextFile = Annotated[Path, AfterValidator(existing_file)]
"""A file that exists; its text is checked by its reader."""
Key = Annotated[SecretStr, AfterValidator(sendable_key)]
Endpoint = Annotated[str, BeforeValidator(parse_endpoint)]


def listed(precisions: tuple[str, ...] | str | None, device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """The names in a ``Precisions`` value, each once; for ``ALL`` and None, those of ``loaders.direct``."""
    if precisions in (ALL, None, ()):
        return loaders.direct(device)
    return tuple(dict.fromkeys(precisions or ()))


def option(
    default: Any, group: str, metavar: str | None, text: str, *, unset: str | None = None, **rules: Any
) -> Any:
    """A setting and its display in ``--help``.

    Args:
        group: its heading.
        metavar: name of its value; None for a switch.
        unset: description of the default None.
        rules: further arguments of ``pydantic.Field``.
    """
    shown: dict[str, Any] = {"group": group, "metavar": metavar, "unset": unset}
    return Field(default, description=text, json_schema_extra=shown, **rules)
