"""Values of a ``transformers`` configuration: which have an effect, and which of those are impossible."""

import math
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loaders.errors import CheckpointError

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}
_POSITIVE = ("rope_theta", "factor", "partial_rotary_factor")


def known_value(config: Any, key: str) -> Any:
    """The value of an option that the configuration's class has; None for one that ``transformers`` ignores.

    A configuration keeps every key of its file. A ``sliding_window`` left in a Llama's has no effect there.
    """
    family: Any = type(config)
    return getattr(config, key, None) if _knows(family, key) else None


@cache
def _knows(family: Hashable, key: str) -> bool:
    try:
        return callable(family) and hasattr(family(), key)
    except Exception:  # of any class: a configuration without defaults
        return True


def check_values(name: str, text: Any) -> None:
    """Checks norms, attention windows and rotary positions, which ``transformers`` computes with unchecked.

    Raises:
        CheckpointError: a value is impossible; the error names it.
    """
    for key in _EPSILONS:
        value = getattr(text, key, None)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise _impossible(name, key, value)
    window = known_value(text, "sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise _impossible(name, "sliding_window", window)
    if window is None and "sliding_attention" in (known_value(text, "layer_types") or ()):
        raise CheckpointError(f"config.json of {name} has sliding_attention layers and no sliding_window")
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        _check_rope(name, rope)


def check_state(name: str, text: Any) -> None:
    """Checks that the only state of a sequence is keys and values per token, as the KV caches hold it.

    Raises:
        CheckpointError: no precision of the model can be served.
    """
    if unknown := {str(kind) for kind in known_value(text, "layer_types") or ()} - _ATTENTION_TYPES:
        raise CheckpointError(
            f"{name} can't be served: it has {', '.join(sorted(unknown))[:80]} layers; only models whose "
            "state is keys and values per token can be batched here"
        )
    if getattr(text, "attn_temperature_tuning", None):
        raise CheckpointError(
            f"{name} can't be served: it scales attention by the length of the cache, which batched "
            "sequences don't share"
        )


def _ropes(value: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of rotary positions: one set, or one for each kind of layer."""
    if not isinstance(value, dict):
        return
    inner = [one for one in value.values() if isinstance(one, dict)]
    yield from inner or [value]


def _check_rope(name: str, rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise CheckpointError(f"config.json of {name} names an unknown rope_type {str(kind)[:40]!r}")
    for key in _POSITIVE:
        value = rope.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise _impossible(name, key, value)
    if (share := rope.get("partial_rotary_factor")) is not None and share > 1:
        raise _impossible(name, "partial_rotary_factor", share)


def _impossible(name: str, key: str, value: object) -> CheckpointError:
    return CheckpointError(f"config.json of {name} has {key} {str(value)[:40]}")
