"""Device memory: what is free, and how much of that a KV cache may take. All figures are bytes."""

from typing import Any

import torch

from loaders.base import ModelSpec
from loaders.cuda import buckets
from loaders.errors import OutOfMemory

_MARGIN = 0.9  # of free memory; the rest is for activations, graphs and other processes
_SHARE = 0.5  # of that, for the KV cache of one precision, so that others can be loaded


def smallest_cache(config: Any, tokens: int) -> int:
    """The smallest KV cache: one sequence in float32, and the dummy slot of padding rows.

    Args:
        config: the model's, of ``transformers``; the result is 0 if it has no number of heads, or several.
        tokens: most tokens of one sequence.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    token: int = text.num_hidden_layers * 2 * kept * width * torch.float32.itemsize
    return 2 * buckets.columns_for(tokens) * token


def card_free(device: int | torch.device | None = None) -> int:
    """Free memory of a device: the driver's, and what torch's allocator has reserved but not allocated."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def refusals() -> int:
    """Allocations that failed on any device since the process started; 0 without a GPU."""
    if not torch.cuda.is_initialized():
        return 0
    cards = range(torch.cuda.device_count())
    return sum(torch.cuda.memory_stats(index).get("num_ooms", 0) for index in cards)


def cards_free() -> list[int]:
    """Free memory of every visible device."""
    return [card_free(index) for index in range(torch.cuda.device_count())]


def device_map(spec: ModelSpec, needed: int) -> str:
    """The ``device_map`` of ``from_pretrained``: the device, or ``auto`` for several GPUs.

    Args:
        needed: estimated bytes of the weights.
    """
    if spec.device == "cpu":
        return spec.device
    return spread(needed + smallest_cache(spec.checkpoint.config, spec.max_tokens), cards_free())


def spread(needed: int, free: list[int]) -> str:
    """``cuda`` if the first GPU has room; ``auto``, which fills one after the other, if only all have."""
    return "auto" if len(free) > 1 and needed > free[0] * _MARGIN else "cuda"


def fitting_slots(wanted: int, slot_bytes: int, free: int) -> int:
    """The number of KV slots: ``wanted``, or as many as fit half of the free memory.

    Raises:
        OutOfMemory: not even one fits.
    """
    fit = int(free * _MARGIN * _SHARE) // slot_bytes - 1  # one more is the dummy slot of padding rows
    if fit < 1:
        fit = int(free * _MARGIN) // slot_bytes - 1
        wanted = 1
    if fit < 1:
        raise OutOfMemory(
            f"no room on the device for the keys and values of one sequence: they take {slot_bytes} bytes, "
            f"twice, and {free} are free; a smaller MAX_TOTAL_TOKENS makes them smaller"
        )
    return min(wanted, fit)
