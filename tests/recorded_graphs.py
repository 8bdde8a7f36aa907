"""A replacement of CUDA graphs without a GPU: operations are recorded with the tensors that they touched.

As with a real graph, a replay runs no Python of the captured work. It repeats the recorded operations on the
recorded tensors and writes into the recorded results. A step that allocates a new input tensor, or keeps
changing state in a Python variable, gives wrong results here too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {"item", "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select"}
"""Operations that synchronize with the host: they are an error during capture."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        found = func(*args, **kwargs)
        self._note(func, args, kwargs, found)
        return found

    def _note(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in given}
        results = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        fresh = [t for t in results if t.untyped_storage().data_ptr() not in addresses]
        writes = func._schema.is_mutable
        if not fresh and not writes:
            return  # a view: its memory is the same at every replay

        def repeat() -> None:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for kept, new in zip(results, again, strict=True):
                if any(kept is tensor for tensor in fresh):
                    kept.copy_(new)

        self.tape.append(repeat)


class RecordedGraphs:
    """Implements ``loaders.cuda.cuda_graphs.Graphs``.

    Args:
        refuse: exceptions by the number of the capture that raises them, counted from 1.
    """

    def __init__(self, refuse: dict[int, Exception] | None = None) -> None:
        self._refuse = refuse or {}
        self.captures = self.replays = 0
        self.nbytes = 0

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        self.captures += 1
        if (error := self._refuse.get(self.captures)) is not None:
            raise error
        work()
        with _Recorder() as recorder:
            work()

        @torch.inference_mode()
        def replay() -> None:
            self.replays += 1
            for repeat in recorder.tape:
                repeat()

        return replay
