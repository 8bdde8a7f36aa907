"""Quantizing a model block by block on calibration text: the inputs of a block are those that it will have.

Each block computes the text twice: before it is quantized, for Σ x xᵀ of the inputs of its linear layers, and
after, for the inputs of the next one. So the errors of earlier blocks are part of what a block is calibrated
on, and the memory is that of one block's matrices and of the hidden states of the text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders.architectures import UnsupportedArchitecture, architecture_of
from loaders.base import Progress
from loaders.errors import CheckpointError

_VALUES, _DOWN = "v_proj", "down_proj"  # as most architectures name them
Replace = Callable[[str, "nn.Linear | Conv1D", Tensor | None], None]
"""Called with a layer's name, the layer and Σ x xᵀ of its inputs, which is None if it had none."""


def without_blocks(model: PreTrainedModel) -> str | None:
    """The reason that the model can't be calibrated block by block; None if it has a list of them."""
    if _find_blocks(model) is not None:
        return None
    return f"{type(model).__name__} has no list of blocks to calibrate one by one"


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of blocks of a model that has one, and its name."""
    found = _find_blocks(model)
    assert found is not None, without_blocks(model)
    return found


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    return None


def targets(model: PreTrainedModel) -> list[tuple[str, "nn.Linear | Conv1D"]]:
    """The linear layers of the blocks, with their full names; none of a model without a list of blocks."""
    if (found := _find_blocks(model)) is None:
        return []
    prefix, blocks = found
    return [(f"{prefix}.{name}", layer) for name, layer in linears_of(blocks)]


def sensitive_layers(model: PreTrainedModel) -> set[str]:
    """Names of the layers that lose most in four bits, which get eight."""
    try:
        down = architecture_of(model.config).block.down
    except UnsupportedArchitecture:
        down = _DOWN
    return {name for name, _ in targets(model) if name.endswith((f".{_VALUES}", f".{down}"))}


def linears_of(block: nn.Module) -> Iterator[tuple[str, "nn.Linear | Conv1D"]]:
    return ((name, one) for name, one in block.named_modules() if isinstance(one, nn.Linear | Conv1D))


@torch.inference_mode()
def quantize_blocks(model: PreTrainedModel, samples: Tensor, replace: Replace, progress: Progress) -> None:
    """Calls ``replace``, which substitutes the layer, for every linear layer of the model's blocks.

    Args:
        samples: (samples, length) token ids.

    Raises:
        CheckpointError: the blocks don't follow each other.
    """
    prefix, blocks = blocks_of(model)
    calls = _recorded(model, blocks, samples[:1])
    states = [_first_input(model, blocks[0], ids[None]) for ids in samples]
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        with _Hessians(block) as hessians:
            states_after = [call.run(block, state) for state in states]
        del states_after
        for name, linear in list(linears_of(block)):
            replace(f"{prefix}.{number}.{name}", linear, hessians.of(name))
        states = [call.run(block, state) for state in states]
        progress("calibrating", number + 1, len(blocks))


@dataclass
class _Call:
    """A block's call: the arguments besides the hidden states, which depend on positions alone."""

    state: Tensor
    arguments: Sequence[Any]
    named: dict[str, Any] = field(default_factory=dict)

    def run(self, block: nn.Module, state: Tensor) -> Tensor:
        found = block(state, *self.arguments, **self.named)
        after: Tensor = found[0] if isinstance(found, tuple) else found
        return after


def _recorded(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor) -> list[_Call]:
    calls: list[_Call] = []

    def record(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        others = {name: value for name, value in named.items() if name != "hidden_states"}
        if arguments:
            calls.append(_Call(arguments[0], arguments[1:], others))
        else:
            calls.append(_Call(named["hidden_states"], (), others))

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
        model.base_model(ids, use_cache=False)
    states = [call.state for call in calls]
    if len(calls) != len(blocks) or not all(
        torch.equal(call.run(block, state), following)
        for call, block, state, following in zip(calls, blocks, states, states[1:], strict=False)
    ):
        raise CheckpointError(
            f"blocks of {type(model).__name__} don't follow each other: they can't be calibrated one by one"
        )
    for call in calls:
        call.state = call.state[:0]
    return calls


class _Stop(Exception):
    pass


def _first_input(model: PreTrainedModel, first: nn.Module, ids: Tensor) -> Tensor:
    found: list[Tensor] = []

    def stop(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else named["hidden_states"])
        raise _Stop

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(ids, use_cache=False)
    except _Stop:
        pass
    finally:
        hook.remove()
    return found[0]


class _Hessians:
    """Σ x xᵀ of the inputs of a block's linear layers; those that read the same tensor share one."""

    def __init__(self, block: nn.Module) -> None:
        self._sums: dict[str, Tensor] = {}
        self._same: dict[str, str] = {}
        self._stack = ExitStack()
        self._last: tuple[str, Tensor] | None = None
        self._block = block

    def __enter__(self) -> "_Hessians":
        for name, linear in linears_of(self._block):
            self._stack.callback(linear.register_forward_pre_hook(self._adder(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._last = None

    def of(self, name: str) -> Tensor | None:
        return self._sums.get(self._same.get(name, name))

    def _adder(self, name: str) -> Callable[[nn.Module, Any], None]:
        def add(module: nn.Module, arguments: Any) -> None:
            x: Tensor = arguments[0]
            if self._last is not None and self._last[1] is x:
                self._same[name] = self._last[0]
                return
            self._last = name, x
            rows = x.reshape(-1, x.shape[-1]).float()
            if name not in self._sums:
                self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1])
            self._sums[name].addmm_(rows.t(), rows)

        return add
