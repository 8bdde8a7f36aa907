"""Additive attention masks over the columns of a KV cache."""

from typing import Any

import torch
from torch import Tensor

from loaders.config_values import known_value


def additive(positions: Tensor, columns: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """(rows, 1, tokens, columns): 0 where the token at p attends (p − window + 1 … p), elsewhere
    the smallest finite number.

    Args:
        positions: (rows, tokens).
        columns: (columns,) 0, 1, 2 …, on the same device.
    """
    hidden = columns > positions[..., None]
    if window is not None:
        hidden |= columns <= positions[..., None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


class Masks:
    """The masks of one ``transformers`` model, whose layers may have different attention windows."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self._window: int | None = known_value(config, "sliding_window")
        self._types = set(known_value(config, "layer_types") or ())

    def of(self, positions: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor | None]:
        """The mask as the model's forward expects it: a dict by attention type if it mixes several.

        Recurrent layers' is None: they mask padding tokens alone.
        """
        full = additive(positions, columns, dtype)
        if self._window is None or (self._types and "sliding_attention" not in self._types):
            return full
        sliding = additive(positions, columns, dtype, self._window)
        if len(self._types) < 2:
            return sliding
        recurrent = dict.fromkeys(self._types)
        return {**recurrent, "full_attention": full, "sliding_attention": sliding}
