"""What the compiled forward pass needs to know of an architecture, from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loaders.config_values import known_value
from loaders.kernels.decoder_layers import Activation, Shape

# names in ``transformers.activations.ACT2FN``
_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
# rope types whose angles depend on the position alone
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


class UnsupportedArchitecture(Exception):
    """The compiled forward pass can't compute a model; the message gives the reason."""


@dataclass(frozen=True)
class BlockNames:
    """Names of a block's modules, relative to the block."""

    before_attention: str
    qkv: Sequence[str]
    attention_out: str
    before_mlp: str
    mlp_in: Sequence[str]
    down: str
    query_norm: str | None = None
    key_norm: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer as data.

    Args:
        model_class: name of the ``transformers`` class; a subclass may compute otherwise.
        windows: of each layer the tokens that a token attends to, itself included; None: all.
        tokens, blocks, last, head: names of modules.
        positions: name of the embedding of positions; None: they are rotary.
        first_position: row of that embedding for position 0.
        rotary: name of the module that computes the cosines and sines.
        norm_offset: is added to the weights of norms.
    """

    model_class: str
    shape: Shape
    windows: Sequence[int | None]
    block: BlockNames
    tokens: str
    blocks: str
    last: str
    head: str = "lm_head"
    positions: str | None = None
    first_position: int = 0
    rotary: str | None = None
    norm_offset: float = 0.0


def activation(name: Any) -> Activation:
    """
    Raises:
        UnsupportedArchitecture: the kernels don't have it.
    """
    if name not in _ACTIVATIONS:
        raise UnsupportedArchitecture(f"its activation is {name!r}")
    return _ACTIVATIONS[name]


def windows(config: Any) -> list[int | None]:
    """The attention windows of all layers, by ``sliding_window`` and ``layer_types``.

    Raises:
        UnsupportedArchitecture: a layer has other attention than full or sliding.
    """
    count, window = config.num_hidden_layers, known_value(config, "sliding_window")
    types = known_value(config, "layer_types")
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * count
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedArchitecture(f"it has {', '.join(sorted(unknown))} layers")
    if len(types) != count or ("sliding_attention" in types and window is None):
        raise UnsupportedArchitecture("its attention windows are not those of its layers")
    return [window if kind == "sliding_attention" else None for kind in types]


def check_rope(config: Any) -> None:
    """
    Raises:
        UnsupportedArchitecture: rotary positions that depend on more than the position.
    """
    rope = getattr(config, "rope_parameters", None)
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else None
    if kind not in _ROPE_TYPES:
        raise UnsupportedArchitecture(f"its rotary positions are of type {kind!r}")
