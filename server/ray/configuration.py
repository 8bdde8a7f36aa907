"""The settings of a replica: those of the application, the deployment's ``user_config``, its resources."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from server.settings.server import Settings


@dataclass(frozen=True)
class Resources:
    """What Ray has assigned to a replica.

    Args:
        cpus: logical CPUs.
        gpus: of one card, if less than 1.
        memory: bytes; None if the deployment reserves none.
        card_bytes: the memory of the first card; 0 without one.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    memory: int | None = None
    card_bytes: int = 0

    def memory_budget(self) -> int | None:
        """Bytes for the models of this replica; None if it may take what is free."""
        if self.card_bytes and 0 < self.gpus < 1:
            return int(self.gpus * self.card_bytes)
        return None if self.gpus else self.memory


def assigned() -> Resources:
    """The resources of this process, which is a replica."""
    import ray
    import torch

    found = ray.get_runtime_context().get_assigned_resources()
    card = torch.cuda.mem_get_info()[1] if found.get("GPU") and torch.cuda.is_available() else 0
    memory = found.get("memory")
    return Resources(found.get("CPU", 0.0), found.get("GPU", 0.0), memory and int(memory), card)


_FIXED = ("precision", "precisions", "cors_allow_origin", "host", "port")
"""Settings that a replica doesn't choose: its deployment's, the router's and Ray's own."""


def checked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A ``user_config``.

    Raises:
        ValueError: it names what is no setting, which ``Settings`` itself ignores, or none of a replica.
    """
    if fixed := [name for name in overrides if name in _FIXED]:
        raise ValueError(f"user_config can't set {', '.join(fixed)} of a replica; set it for the application")
    if unknown := sorted(set(overrides) - set(Settings.model_fields)):
        raise ValueError(f"user_config has {', '.join(unknown)}; it takes settings of docs/settings.md")
    return dict(overrides)


def replica_settings(
    application: Mapping[str, Any], overrides: Mapping[str, Any], precision: str, resources: Resources
) -> Settings:
    """The settings of a replica of ``precision``.

    ``overrides`` go before the application's, those before variables of the replica's own environment. Its
    CPU threads and its memory budget are the resources that are assigned to it, unless they are set.

    Args:
        application: the settings that the application was built with, without defaults.
        overrides: the deployment's ``user_config``.

    Raises:
        ValueError: a value is not valid.
    """
    given = {**application, **checked(overrides)}
    # the router answers requests of other origins, and it alone
    given |= {"precision": precision, "precisions": (precision,), "cors_allow_origin": ()}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        wrong = {str((one["loc"] or ("settings",))[0]): one["msg"] for one in reversed(error.errors())}
        words = [f"{name}: {text.removeprefix('Value error, ')}" for name, text in wrong.items()]
        raise ValueError("; ".join(words)) from None
    derived: dict[str, Any] = {}
    if settings.threads is None and resources.cpus >= 1:
        derived["threads"] = int(resources.cpus)
    if settings.memory_budget is None and (budget := resources.memory_budget()) is not None:
        derived["memory_budget"] = budget
    return settings.model_copy(update=derived)
