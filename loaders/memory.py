"""The card's memory: what is free of it, and how much of that a KV cache may take. Bytes everywhere."""

import torch

from loaders.base import ModelSpec, OutOfMemory

_MARGIN = 0.9  # of what is free; the rest is for activations, graphs and others
_SHARE = 0.5  # of that, for the keys and values of one precision: others are loaded beside it


def card_free(device: int | torch.device | None = None) -> int:
    """Free on a card: what the driver has, and what torch's allocator holds but doesn't use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def cards_free() -> list[int]:
    """Of every card that can be seen."""
    return [card_free(index) for index in range(torch.cuda.device_count())]


def device_map(spec: ModelSpec, needed: int) -> str:
    """Where ``from_pretrained`` is to put the weights: the device, or ``auto``, which is several cards.

    Args:
        needed: estimated bytes of the weights.
    """
    return spec.device if spec.device == "cpu" else spread(needed, cards_free())


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
