"""Operations of the emulated card: the host's kernels, by the card's rules.

Every operation on a tensor of the card is dispatched here and computed by the host on the same memory. As on
a card, an operation on tensors of both host and card is an error, and so is, while a stream captures, every
synchronization and every copy between the two. A non-blocking copy to the host arrives when the host
synchronizes.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.emulated_card.memory import on_card, on_host

_COPIES = {"copy_", "_copy_from", "_copy_from_and_resize"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Their indices may be on the host; the card synchronizes for them."""
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select", "unique_dim"}
_COMPOSITE = ("copy_",)
"""Composite operations of torch that select kernels themselves."""
_GARBAGE = 77
_libraries: list[torch.library.Library] = []
_local = threading.local()


def begin() -> None:
    """Registers the operations of the device ``cuda``."""
    everything, several = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_compute, "CUDA")
    for packet in (getattr(torch.ops.aten, name) for name in _COMPOSITE):
        for operation in (getattr(packet, overload) for overload in packet.overloads()):
            several.impl(operation, partial(_compute, operation), "CUDA")
    _libraries.extend((everything, several))


# captures


class Tape:
    """Operations in their order, with the memory that they read and wrote."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, Any, Any, list[Tensor], list[Tensor]]] = []

    def note(self, operation: Any, args: Any, kwargs: Any, found: list[Tensor], fresh: list[Tensor]) -> None:
        if fresh or operation._schema.is_mutable:  # otherwise a view of the same memory
            self._entries.append((operation, args, kwargs, found, fresh))

    @torch.inference_mode()
    def repeat(self) -> None:
        for operation, args, kwargs, found, fresh in self._entries:
            again = _tensors(operation(*args, **kwargs))
            for kept, new in zip(found, again, strict=True):
                if any(kept is tensor for tensor in fresh):
                    kept.copy_(new)


def recording() -> Tape | None:
    """The tape of this thread's capture; None while it doesn't capture."""
    tape: Tape | None = getattr(_local, "tape", None)
    return tape


def record(tape: Tape | None) -> None:
    """Sets this thread's tape; None ends the recording."""
    _local.tape = tape


def check_not_recording(what: str) -> None:
    """Raises: RuntimeError, as CUDA does."""
    if recording() is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


# waiting


def wait(what: str) -> None:
    """Synchronizes: completes the pending copies to the host."""
    check_not_recording(what)
    with torch.inference_mode():
        for target, values in _under_way():
            target.copy_(values)
    _under_way().clear()


def _under_way() -> list[tuple[Tensor, Tensor]]:
    """This thread's pending copies to the host: (target, values)."""
    found: list[tuple[Tensor, Tensor]] = _local.__dict__.setdefault("under_way", [])
    return found


def _copied_later(target: Tensor, source: Tensor) -> Tensor:
    """A non-blocking copy: until ``wait`` the target holds garbage."""
    _under_way().append((target, on_host(source).clone()))
    return target.fill_(_GARBAGE)


# computing


def _compute(operation: Any, *given_args: Any, **given_kwargs: Any) -> Any:
    args: Any = given_args
    kwargs: Any = given_kwargs
    name = operation.overloadpacket.__name__
    tensors = _tensors((args, kwargs))
    _check(name, tensors)
    to_host = name == "copy_" and not tensors[0].is_cuda
    if to_host and args[2:] == (True,):
        return _copied_later(*tensors)
    if to_host or name in _WAITS:
        wait(name)
    hosts = {id(tensor): _host_of(tensor) for tensor in tensors if tensor.is_cuda}
    args, kwargs = _mapped(lambda leaf: _of_host(leaf, hosts), (args, kwargs))
    args = _with_scalars(operation, args, tensors)
    found = _called(operation, args, kwargs)
    for tensor in tensors:
        _resize(tensor, hosts.get(id(tensor)))
    card = _card_of(given_args, given_kwargs, tensors)
    owners = {host.untyped_storage()._cdata for host in hosts.values()}
    fresh = [tensor for tensor in _tensors(found) if tensor.untyped_storage()._cdata not in owners]
    if (tape := recording()) is not None:
        tape.note(operation, args, kwargs, _tensors(found), fresh)
    given = {id(hosts.get(id(tensor), tensor)): tensor for tensor in tensors}
    return _mapped(lambda leaf: _of_card(leaf, card, given, fresh), found)


def _called(operation: Any, args: Any, kwargs: Any) -> Any:
    try:
        return operation(*args, **kwargs)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError("CUDA out of memory.") from None


def _check(name: str, tensors: list[Tensor]) -> None:
    mixed = len({tensor.device for tensor in tensors if tensor.dim()}) > 1
    crosses = name in _COPIES and len({tensor.device for tensor in tensors}) > 1
    if name in _WAITS or mixed or crosses:
        check_not_recording(name)
    if mixed and name not in _COPIES | _INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found two ({name})")


def _host_of(tensor: Tensor) -> Tensor:
    """The host's view; an empty tensor gets new memory, because it may be an output that is resized."""
    if tensor.numel():
        return on_host(tensor)
    with torch.inference_mode(tensor.is_inference()):
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def _resize(tensor: Tensor, host: Tensor | None) -> None:
    if host is not None and host.shape != tensor.shape and not tensor.numel():
        tensor.data = on_card(host, tensor.device.index, owned=True)


def _with_scalars(operation: Any, args: Any, tensors: list[Tensor]) -> list[Any]:
    """Python numbers → 0-dim tensors, where the operation's schema has a tensor."""
    precise = torch.float64 if any(tensor.is_floating_point() for tensor in tensors) else None
    return [
        torch.tensor(given, dtype=precise if isinstance(given, float) else None)
        if isinstance(given, bool | int | float) and wanted.type.kind() == "TensorType"
        else given
        for given, wanted in zip(args, operation._schema.arguments, strict=False)
    ]


def _of_host(leaf: Any, hosts: dict[int, Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        return hosts.get(id(leaf), leaf)
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return torch.device("cpu")
    return leaf


def _of_card(leaf: Any, card: int, given: dict[int, Tensor], fresh: list[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) in given:  # an in-place operation returns its input
        return given[id(leaf)]
    return on_card(leaf, card, owned=any(leaf is tensor for tensor in fresh))


def _card_of(args: Any, kwargs: Any, tensors: list[Tensor]) -> int:
    """The device of a new result: the ``device`` argument, or that of the tensors."""
    named: list[torch.device] = []
    _mapped(lambda leaf: named.append(leaf) if isinstance(leaf, torch.device) else None, (args, kwargs))
    devices = [*named, *(tensor.device for tensor in tensors if tensor.is_cuda)]
    return next((d.index for d in devices if d.index is not None), current_card())


def current_card() -> int:
    """This thread's current device."""
    card: int = getattr(_local, "card", 0)
    return card


def set_card(card: int) -> None:
    _local.card = card


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Applies ``change`` to the leaves of lists, tuples and dicts."""
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(change, part) for part in tree])
    if isinstance(tree, dict):
        return {name: _mapped(change, part) for name, part in tree.items()}
    return change(tree)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def look(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            found.append(leaf)

    _mapped(look, tree)
    return found
