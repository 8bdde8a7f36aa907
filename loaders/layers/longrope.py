"""LongRoPE (Ding et al. 2024, arXiv:2402.13753): rotary embeddings that depend on the length of the text.

Up to the original context a text is rotated by one set of frequencies, beyond it by another. ``transformers``
selects the set by the largest position of a forward pass; here each row's is selected by its own length.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loaders.errors import CheckpointError


class RowRope(nn.Module):
    """A model's rotary embedding with the set of frequencies selected for each row.

    Args:
        rope: the model's own module, which selects the set by the largest of its positions.
        original: tokens of the original context.
    """

    def __init__(self, rope: nn.Module, original: int) -> None:
        super().__init__()
        self._rope, self.original = rope, original
        self.long: Tensor | bool = False
        """Whether rows are beyond the original context: one value for all rows, or (rows,) booleans."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if isinstance(self.long, bool):
            return self._rotation(self.long, x, position_ids, *args, **kwargs)
        pair = (self._rotation(long, x, position_ids, *args, **kwargs) for long in (True, False))
        choice = self.long.to(x.device)[:, None, None]
        return tuple(torch.where(choice, long, short) for long, short in zip(*pair, strict=True))

    def _rotation(
        self, long: bool, x: Tensor, positions: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        if not long:
            return tuple(self._rope(x, positions.clamp(max=self.original - 1), *args, **kwargs))
        # one more position, beyond the original context, selects the long set
        beyond = positions.new_full((len(positions), 1), self.original)
        parts = self._rope(x, torch.cat([positions, beyond], dim=1), *args, **kwargs)
        return tuple(part[:, :-1] for part in parts)


class LongRope:
    """The set of frequencies of each slot of a runner, and its ids, recomputed when the set changes."""

    def __init__(self, ropes: Sequence[RowRope], original: int, slots: int) -> None:
        self._ropes, self._original = ropes, original
        self._long = [False] * slots
        self._held: list[list[int]] = [[] for _ in range(slots)]

    @classmethod
    def of(cls, model: nn.Module, slots: int, context: int) -> "LongRope | None":
        """Replaces the model's rotary embeddings by ``RowRope``; None if no text exceeds an original context.

        A second runner of the model uses those of the first; only one of them computes at a time.

        Raises:
            CheckpointError: layers of different kinds have different original contexts.
        """
        if held := [module for module in model.modules() if isinstance(module, RowRope)]:
            return cls(held, held[0].original, slots)
        found = dict(_switching(model, context))
        if not found:
            return None
        originals = {original for _, original in found.values()}
        if len(originals) > 1:
            raise CheckpointError(f"{type(model).__name__} has layers of different original contexts")
        original, ropes = originals.pop(), []
        for name, (module, _) in found.items():
            ropes.append(RowRope(module, original))
            model.set_submodule(name, ropes[-1])
        return cls(ropes, original, slots)

    def expect(self, slot: int, tokens: int) -> bool:
        """Sets the expected tokens of the slot; returns whether its present ids must be recomputed."""
        if self._long[slot] or tokens <= self._original:
            return False
        self._long[slot] = True
        return bool(self._held[slot])

    def held(self, slot: int) -> Sequence[int]:
        """The ids in the slot."""
        return self._held[slot]

    def append(self, slots: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
        for slot, new in zip(slots, ids, strict=True):
            self._held[slot].extend(new)

    def clear(self, slot: int) -> None:
        self._long[slot], self._held[slot] = False, []

    def enter(self, slots: Sequence[int]) -> None:
        """Selects the sets for a forward pass over these slots."""
        rows = [self._long[slot] for slot in slots]
        self._set(rows[0] if len(set(rows)) == 1 else torch.tensor(rows))

    def enter_alone(self, tokens: int) -> None:
        """Selects the set for a forward pass over whole texts of ``tokens``."""
        self._set(tokens > self._original)

    def _set(self, long: Tensor | bool) -> None:
        for rope in self._ropes:
            rope.long = long


def changing_positions(config: Any) -> str | None:
    """The reason that one graph can't hold the model's rotary embeddings; None if it can."""
    ropes: Any = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (ropes, *ropes.values()) if isinstance(one, dict)}
    if changing := [kind for kind in ("dynamic", "longrope") if kind in kinds]:
        return f"its rotary embeddings ({', '.join(changing)}) depend on the length of a text"
    return None


def depends_on_length(model: nn.Module, context: int) -> bool:
    """Whether the rotation of texts of up to ``context`` tokens depends on their length."""
    return any(True for _ in _switching(model, context))


def _switching(model: nn.Module, context: int) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    for name, module in model.named_modules():
        for original in _originals(module):
            if original < context:
                yield name, (module, original)


def _originals(module: Any) -> Iterator[int]:
    kind = getattr(module, "rope_type", None)
    if kind == "longrope":
        yield int(module.config.rope_parameters["original_max_position_embeddings"])
    elif isinstance(kind, dict):  # by kind of layer
        for layers, one in kind.items():
            if one == "longrope":
                yield int(module.config.rope_parameters[layers]["original_max_position_embeddings"])
