"""Values of a ``transformers`` configuration: which have an effect, and which of those are impossible."""

import math
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loaders.errors import CheckpointError

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}
# whose state has one size for any length, and those without any
_RECURRENT = frozenset({"linear_attention", "mamba", "conv", "hybrid", "attention", "mlp", "moe"})
_LIMIT = "max_position_embeddings"
_TRAINED = ("max_seq_len", "seq_length", "n_ctx")  # lengths that families without such a limit state
_UNSTATED = 2048  # tokens that BLOOM, Mamba and Mamba-2, which state none, were trained with
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
    window, types = known_value(text, "sliding_window"), known_value(text, "layer_types") or ()
    unused = window == 0 and getattr(text, "use_sliding_window", None) is False  # as Qwen2-MoE's is
    if window is not None and not unused and (type(window) is not int or window < 1):
        raise _impossible(name, "sliding_window", window)
    if window is None and "sliding_attention" in types:
        raise CheckpointError(f"config.json of {name} has sliding_attention layers and no sliding_window")
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        _check_rope(name, rope)


def context_length(name: str, text: Any) -> int:
    """Maximum tokens of one sequence.

    A family without positions (ALiBi, Mamba) has no limit: what its file states, or ``_UNSTATED``.

    Raises:
        CheckpointError: the family has a limit, and the configuration tells none.
    """
    limit: int | None = getattr(text, _LIMIT, None)
    if limit is not None:
        return limit
    family: Any = type(text)
    if _knows(family, _LIMIT):
        raise CheckpointError(f"config.json of {name} tells no context length ({_LIMIT})")
    stated = (getattr(text, key, None) for key in _TRAINED)
    return next((value for value in stated if type(value) is int and value > 0), _UNSTATED)


def other_state(text: Any, known: frozenset[str] = frozenset()) -> str | None:
    """The reason why a sequence's state is not keys and values per token alone; None if it is.

    Args:
        known: further types of layers whose state is kept.
    """
    kinds = {str(kind) for kind in known_value(text, "layer_types") or ()}
    if unknown := kinds - _ATTENTION_TYPES - known:
        return f"it has {', '.join(sorted(unknown))[:80]} layers"
    return None


def unbatchable(text: Any) -> str | None:
    """The reason why rows of a batch can't be computed together, as far as the configuration tells it.

    No value may depend on the cache's length, which is that of the longest row.
    """
    if (why := other_state(text, _RECURRENT)) is not None:
        return why
    if getattr(text, "attn_temperature_tuning", None):
        return "it scales attention by the length of the cache"
    return None


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
