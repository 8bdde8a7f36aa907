"""The card's memory: what is free of it, and how much of that a KV cache may take. Bytes everywhere."""

from typing import Any

import torch

from loaders.base import ModelSpec
from loaders.cuda import buckets
from loaders.errors import OutOfMemory

_MARGIN = 0.9  # of what is free; the rest is for activations, graphs and others
_SHARE = 0.5  # of that, for the keys and values of one precision: others are loaded beside it


def smallest_cache(config: Any, tokens: int) -> int:
    """Keys and values of one sequence in float32, and of the rows of nobody: what a model can't run without.

    Args:
        config: the model's, of ``transformers``; 0 where it doesn't tell its heads.
        tokens: most of one sequence.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    token: int = text.num_hidden_layers * 2 * kept * width * torch.float32.itemsize
    return 2 * buckets.columns_for(tokens) * token


def card_free(device: int | torch.device | None = None) -> int:
    """Free on a card: what the driver has, and what torch's allocator holds but doesn't use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def refusals() -> int:
    """How often a card's allocator had no room, whoever asked, since the process began; 0 without a card."""
    if not torch.cuda.is_initialized():
        return 0
    cards = range(torch.cuda.device_count())
    return sum(torch.cuda.memory_stats(index).get("num_ooms", 0) for index in cards)


def cards_free() -> list[int]:
    """Of every card that can be seen."""
    return [card_free(index) for index in range(torch.cuda.device_count())]


def device_map(spec: ModelSpec, needed: int) -> str:
    """Where ``from_pretrained`` is to put the weights: the device, or ``auto``, which is several cards.

    Args:
        needed: estimated bytes of the weights.
    """
    if spec.device == "cpu":
        return spec.device
    return spread(needed + smallest_cache(spec.checkpoint.config, spec.max_tokens), cards_free())


def spread(needed: int, free: list[int]) -> str:
    """``cuda`` if the first card has room; ``auto``, which fills one after the other, if only all have."""
    return "auto" if len(free) > 1 and needed > free[0] * _MARGIN else "cuda"


def fitting_slots(wanted: int, slot_bytes: int, free: int) -> int:
    """How many KV slots there will be: all that are wanted, or as many as half of what is free holds.

    Raises:
        OutOfMemory: there is no room for a single one.
    """
    fit = int(free * _MARGIN * _SHARE) // slot_bytes - 1  # one more is written to by rows of nobody
    if fit < 1:
        fit = int(free * _MARGIN) // slot_bytes - 1
        wanted = 1
    if fit < 1:
        raise OutOfMemory(
            f"no room on the device for the keys and values of one sequence: they take {slot_bytes} bytes, "
            f"twice, and {free} are free; a smaller MAX_TOTAL_TOKENS makes them smaller"
        )
    return min(wanted, fit)
