"""Whether a model's attention can be replaced by ONNX Runtime's."""

from typing import Any

from loaders.layers.attention_probe import attention_calls, outside_interface
from loaders.onnx.step import cache_shape

_HEAD_WIDTH = 8


def attention_refusal(config: Any) -> str | None:
    """Why it can't; None if it can, or if only exporting tells.

    Args:
        config: the ``transformers`` configuration.
    """
    layers, _, width = cache_shape(config)
    if width % _HEAD_WIDTH:
        return f"its attention heads are {width} wide; ONNX Runtime takes multiples of {_HEAD_WIDTH}"
    if (calls := attention_calls(config)) is None:
        return None
    if (why := outside_interface(calls, layers)) is not None:
        return why
    if any(call.sinks or call.keys != call.values for call in calls):
        return "its attention has no form in ONNX Runtime's GroupQueryAttention"
    return None
