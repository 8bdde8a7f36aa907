"""What the linear layers of a model read while it runs over calibration samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loaders.affine import MinMaxObserver, MSEObserver

_HELD_OUT_ONE_IN = 4  # samples whose rows judge the ranges of the others
_ROWS_PER_SAMPLE = 16  # the first token's among them: its activations are often the largest


class ObservedInputs:
    """The inputs of the linear layers that read the same tensor: their ranges, and a sample of rows."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Of these layers."""
        self.min_max, self.mse = MinMaxObserver(), MSEObserver()
        self._ranges: dict[bool, tuple[Tensor, Tensor]] = {}  # by whether held-out samples are included
        self._rows: list[Tensor] = []
        self._calls = 0

    def update(self, x: Tensor) -> None:
        """Takes in the rows of ``x``, (…, inputs); those of every fourth call are held out.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        x = x.detach().float().reshape(-1, x.shape[-1])
        if not len(x):
            return
        self._calls += 1
        self._widen(True, x)
        if self._calls % _HELD_OUT_ONE_IN == 0:
            self._rows.append(x[torch.linspace(0, len(x) - 1, _ROWS_PER_SAMPLE).long().unique()])
            return
        self._widen(False, x)
        self.min_max.update(x)
        self.mse.update(x)

    @property
    def has_rows(self) -> bool:
        return bool(self._rows)

    def rows(self) -> Tensor:
        """(rows, inputs) of the calls that are held out."""
        return torch.cat(self._rows)

    def ranges(self, held_out: bool) -> tuple[Tensor, Tensor]:
        """(inputs,) smallest and largest values; both include 0.

        Args:
            held_out: include the values of calls that are held out.
        """
        low, high = self._ranges[held_out]
        return low.clamp_max(0), high.clamp_min(0)

    def _widen(self, held_out: bool, x: Tensor) -> None:
        low, high = x.aminmax(dim=0)
        before = self._ranges.get(held_out, (low, high))
        self._ranges[held_out] = torch.minimum(before[0], low), torch.maximum(before[1], high)


def observe(
    run: Callable[[Tensor], object],
    layers: Mapping[str, nn.Module],
    samples: Sequence[Tensor],
    done: Callable[[int], None],
) -> list[ObservedInputs]:
    """Runs a model over each of ``samples``; returns what its layers saw, by shared input.

    Args:
        run: the model on (1, tokens) ids.
        layers: its linear layers by name; those that fewer than four samples reach are in no result.
        done: called with the number of samples that have run.

    Raises:
        ValueError: an activation is NaN or infinite.
    """
    recorder = _Recorder()
    hooks = [layer.register_forward_pre_hook(recorder.hook(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            for count, sample in enumerate(samples, 1):
                run(sample[None])
                done(count)
    finally:
        for hook in hooks:
            hook.remove()
    return [group for group in recorder.groups if group.has_rows]


class _Recorder:
    """Hands each input to its observer, an input that several layers read once.

    Layers that read the same tensor follow each other; which ones do is learnt from the first sample.
    """

    def __init__(self) -> None:
        self.groups: list[ObservedInputs] = []
        self._by_name: dict[str, ObservedInputs] = {}
        self._last: tuple[Tensor, ObservedInputs] | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            shared = self._last is not None and self._last[0] is inputs[0]
            if name not in self._by_name:
                self._add(name, self._last[1] if self._last is not None and shared else None)
            seen = self._by_name[name]
            if not (shared and self._last is not None and self._last[1] is seen):
                seen.update(inputs[0])
            self._last = inputs[0], seen

        return take

    def _add(self, name: str, group: ObservedInputs | None) -> None:
        if group is None:
            group = ObservedInputs()
            self.groups.append(group)
        group.names.append(name)
        self._by_name[name] = group
