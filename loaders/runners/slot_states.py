"""What recurrent layers (linear attention, Mamba, short convolutions) keep of the sequence in each slot."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Key(NamedTuple):
    """Which of a model's states."""

    kind: Literal["conv", "recurrent"]
    layer: int
    number: int


class SlotStates:
    """Tensors (slots, …) by ``Key``, allocated when a layer first gives its state.

    A state is replaced by every pass, not extended: what a pass reads and gives are copies, which ``commit``
    stores. A failed pass leaves the states as they were.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._stored: dict[Key, Tensor] = {}
        self._widths: dict[Key, int] = {}
        self._of_pass: dict[Key, Tensor] = {}
        self._rows: list[int] = []
        self._is_fresh = True

    def enter(self, slots: Sequence[int], is_fresh: bool) -> None:
        """Sets up the next pass, over the given slots.

        Args:
            is_fresh: whether they hold nothing; a layer then begins without a state.
        """
        self._of_pass.clear()
        self._rows, self._is_fresh = list(slots), is_fresh

    def read(self, key: Key) -> Tensor | None:
        """The rows' states, (rows, …), which the layer may change in place; None if it begins without one."""
        stored = self._stored.get(key)
        if self._is_fresh or stored is None:
            return None
        if key not in self._of_pass:
            self._of_pass[key] = stored[self._rows]
        return self._of_pass[key]

    def write(self, key: Key, states: Tensor) -> Tensor:
        """Replaces the rows' states, (rows, …)."""
        self._of_pass[key] = states
        return states

    def extend(self, key: Key, inputs: Tensor, width: int | None) -> Tensor:
        """Appends a convolution's inputs, (rows, channels, tokens), to the last ``width`` ones.

        Args:
            width: None: as many as the first call has.

        Returns:
            (rows, channels, … + tokens): the inputs with those before them, or zeros.
        """
        width = self._widths.setdefault(key, width or inputs.shape[-1])
        before = self.read(key)
        if before is None:
            found = functional.pad(inputs, (max(0, width - inputs.shape[-1]), 0))
        else:
            found = torch.cat([before, inputs], dim=-1)
        self._of_pass[key] = found[..., -width:]
        return found

    def commit(self) -> None:
        """Stores the states of a successful pass."""
        for key, states in self._of_pass.items():
            if key not in self._stored:
                self._stored[key] = states.new_zeros((self._slots, *states.shape[1:]))
            self._stored[key][self._rows] = states
        self._of_pass.clear()

    def clear(self, slot: int) -> None:
        for stored in self._stored.values():
            stored[slot] = 0

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self._stored.values()])

    def drop(self) -> None:
        self._stored.clear()
        self._of_pass.clear()
