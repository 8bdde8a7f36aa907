"""Whether a model can be converted to LiteRT's steps, as far as its configuration tells."""

from transformers import PreTrainedModel

from loaders.config_values import other_state
from loaders.layers.attention_probe import attention_calls, outside_interface
from loaders.layers.longrope import changing_positions
from loaders.litert.lengths import STAND_IN

_LARGEST = 2**31 - 2**24  # bytes of a flatbuffer


def refusal(model: PreTrainedModel) -> str | None:
    """Why it can't; None if it can, or if only converting tells.

    Args:
        model: on the meta device.
    """
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    if size > _LARGEST:
        return f"it has {size / 2**30:.1f} GiB of weights in float32; a .tflite file holds less than 2"
    if any(STAND_IN in parameter.shape for parameter in model.parameters()):
        return f"one of its dimensions is {STAND_IN}, which stands for the cache's length"
    if (why := other_state(model.config.get_text_config())) is not None:
        return why
    if any(parameter.dim() > 2 for parameter in model.parameters()):
        return "the experts of a mixture are in one tensor, which the converter can't choose from"
    if (why := changing_positions(model.config)) is not None:
        return why
    if (calls := attention_calls(model.config)) is None:
        return None
    layers = model.config.get_text_config().num_hidden_layers
    if (why := outside_interface(calls, layers)) is not None:
        return why
    if any(call.sinks or call.keys != call.values for call in calls):
        return "its attention has sinks, or values of another width, which LiteRT's step doesn't have"
    return None
