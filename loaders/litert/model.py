"""A .tflite file's steps, computed by LiteRT on caches that stay where they are.

LiteRT's Python package copies whole tensors in and out. ``libLiteRt.so``, the library beside it, has a C
interface that gives the address of a tensor's memory (``LiteRtLockTensorBuffer``): through it a cache is
written in place, one token at a time.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loaders.litert.steps import Description, Signature, signature_of, step_name

Array = NDArray[Any]
_SHARED = ":memory"
"""The weights in the kernels' layout, packed once, in memory, for all steps; without it, for each step."""
_READ_WRITE = 2  # LiteRtTensorBufferLockMode


@dataclass(frozen=True)
class StepCache:
    """The keys and values of one sequence, by layer, each (heads, length, width).

    Args:
        buffers: of LiteRT, by name, whose memory the arrays are.
    """

    length: int
    keys: Sequence[Array]
    values: Sequence[Array]
    buffers: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def clear(self, tokens: int) -> None:
        for array in (*self.keys, *self.values):
            array[:, :tokens] = 0


@dataclass(frozen=True)
class Output:
    """What a step returns, valid until the next one.

    Args:
        logits: (rows, tokens, vocabulary).
        keys, values: of the new tokens, by layer, each (rows, heads, tokens, width).
    """

    logits: Array
    keys: Sequence[Array]
    values: Sequence[Array]


class StepModel(Protocol):
    """A model as steps; ``LiteRTModel``, or a substitute in tests."""

    description: Description
    signatures: Sequence[Signature]

    def new_cache(self, length: int) -> StepCache:
        """An empty cache of one of the signatures' lengths."""
        ...

    def run(
        self,
        step: Signature,
        tokens: Array,
        positions: Array,
        masks: Sequence[Sequence[Array]],
        caches: Sequence[StepCache],
    ) -> Output:
        """Computes one step; the caches are read.

        Args:
            tokens, positions: (rows, tokens).
            masks: by kind of layer and row, each (1, queries × tokens, length).
            caches: one for each row.
        """
        ...


class LiteRTModel:
    """Implements ``StepModel``."""

    def __init__(self, path: Path, description: Description, threads: int, share: bool) -> None:
        """``share``: all steps read one copy of the packed weights. LiteRT 2.3 confuses the copies of int8
        weights whose activations have ranges taken while computing: results are then wrong.
        """
        from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options

        self.description = description
        cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=_SHARED if share else "")
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
        self._model: Any = CompiledModel.from_file(str(path), options=options)
        self._memory = _Memory()
        self.signatures: Sequence[Signature] = sorted(
            signature_of(name) for name in self._model.get_signature_list()
        )
        self._steps: dict[Signature, _Buffers] = {}

    def new_cache(self, length: int) -> StepCache:
        name = step_name(1, 1, length)
        layers = range(self.description.layers)
        buffers = {
            f"{side}_{layer}": self._model.create_input_buffer_by_name(name, f"{side}_{layer}")
            for side in ("keys", "values")
            for layer in layers
        }
        shape = (self.description.heads, length, self.description.width)
        arrays = {name: self._memory.of(buffer, shape) for name, buffer in buffers.items()}
        for array in arrays.values():
            array.fill(0)
        keys, values = ([arrays[f"{side}_{layer}"] for layer in layers] for side in ("keys", "values"))
        return StepCache(length, keys, values, buffers)

    def run(
        self,
        step: Signature,
        tokens: Array,
        positions: Array,
        masks: Sequence[Sequence[Array]],
        caches: Sequence[StepCache],
    ) -> Output:
        if step not in self._steps:
            self._steps[step] = _Buffers(self._model, step, self._memory)
        buffers = self._steps[step]
        buffers.arrays["tokens"][...] = tokens
        buffers.arrays["positions"][...] = positions
        for at, mask in enumerate(mask for kind in masks for mask in kind):
            buffers.arrays[f"masks_{at}"][...] = mask
        layers = self.description.layers
        for row, cache in enumerate(caches):
            for layer in range(layers):
                for side in ("keys", "values"):
                    buffers.inputs[f"{side}_{row * layers + layer}"] = cache.buffers[f"{side}_{layer}"]
        buffers.arrays["one"][...] = 1
        self._model.run_by_name(buffers.name, buffers.inputs, buffers.outputs)
        return buffers.output(layers)


class _Buffers:
    """The inputs and outputs of one step; the caches among the inputs change from run to run."""

    def __init__(self, model: Any, step: Signature, memory: "_Memory") -> None:
        self.name = step_name(*step)
        given = model.get_input_tensor_details(self.name)
        own = [name for name in given if not name.startswith(("keys", "values"))]
        self.inputs = {name: model.create_input_buffer_by_name(self.name, name) for name in own}
        found = model.get_output_tensor_details(self.name)
        self.outputs = {name: model.create_output_buffer_by_name(self.name, name) for name in found}
        self.arrays = {
            name: memory.of(buffer, details[name]["shape"], details[name]["dtype"])
            for buffers, details in ((self.inputs, given), (self.outputs, found))
            for name, buffer in buffers.items()
        }

    def output(self, layers: int) -> Output:
        keys, values = (
            [self.arrays[f"new_{side}_{at}"] for at in range(layers)] for side in ("keys", "values")
        )
        return Output(self.arrays["logits"], keys, values)


class _Memory:
    """The memory of LiteRT's tensors as arrays."""

    def __init__(self) -> None:
        import ai_edge_litert

        folder = Path(str(ai_edge_litert.__file__)).parent
        self._library = ctypes.CDLL(str(folder / "libLiteRt.so"))
        self._library.LiteRtLockTensorBuffer.argtypes = [
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
        ]
        self._library.LiteRtUnlockTensorBuffer.argtypes = [ctypes.c_void_p]
        self._name = ctypes.pythonapi.PyCapsule_GetName
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.py_object]
        self._pointer = ctypes.pythonapi.PyCapsule_GetPointer
        self._pointer.restype, self._pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

    def of(self, buffer: Any, shape: Sequence[int], dtype: str = "float32") -> Array:
        """The memory of a host buffer, which stays at its address while the buffer lives."""
        capsule, address = buffer.capsule, ctypes.c_void_p()
        pointer = self._pointer(capsule, self._name(capsule))
        status = self._library.LiteRtLockTensorBuffer(pointer, ctypes.byref(address), _READ_WRITE)
        if status or not address.value:
            raise MemoryError(f"LiteRT has no memory for a tensor (status {status})")
        self._library.LiteRtUnlockTensorBuffer(pointer)
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        bytes_ = (ctypes.c_uint8 * count).from_address(address.value)
        return np.ctypeslib.as_array(bytes_).view(dtype).reshape(shape)
