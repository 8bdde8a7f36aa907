"""llama.cpp on a batch of rows, by its C interface: llama-cpp-python's own class decodes one at a time.

Runs in the peers' environment.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_CELLS = 256  # contexts are a multiple of this
_FILE_TYPES = {kind: f"LLAMA_FTYPE_MOSTLY_{kind}" for kind in ("Q8_0", "Q4_0", "Q4_K_M")}


_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept alive: C holds only its address
llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def quantize(source: Path, kind: str, target: Path, threads: int) -> Path:
    """Quantizes with llama.cpp's defaults, like llama-quantize."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, _FILE_TYPES[kind]), threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")
    return target


class LlamaCpp:
    """One GGUF file.

    Args:
        file: path of the GGUF.
        threads: of a forward pass.
    """

    def __init__(self, file: Path, threads: int) -> None:
        self._threads = threads
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {file.name}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.weights_bytes: int | None = int(llama_cpp.llama_model_size(self._model))
        self._shape = (0, 0, 0)
        self._context: Any = None
        self._batch: Any = None

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[list[float], list[list[int]]]:
        """All rows, of equal length, in one call of llama_decode per step.

        Returns: seconds from the start to each step's tokens, and each row's tokens.
        """
        self._prepare(len(prompts), len(prompts[0]) + tokens, len(prompts) * len(prompts[0]))
        times: list[float] = []
        rows: list[list[int]] = [[] for _ in prompts]
        new, position = prompts, 0
        started = time.perf_counter()
        for _ in range(tokens):
            last = self._step(new, position, 1)
            picked = [int(logits.argmax()) for logits in last]
            times.append(time.perf_counter() - started)
            for row, id_ in zip(rows, picked, strict=True):
                row.append(id_)
            position += len(new[0])
            new = [[id_] for id_ in picked]
        return times, rows

    def score(self, texts: list[list[int]], kept: int) -> np.ndarray:
        """Logits (texts, kept, vocabulary) after the last ``kept`` ids of each text, in float32."""
        found = np.empty((len(texts), kept, self._vocabulary), np.float32)
        for text, logits in zip(texts, found, strict=True):
            self._prepare(1, len(text), len(text))
            logits[:] = self._step([text], 0, kept)
        return found

    def close(self) -> None:
        self._drop_context()
        llama_cpp.llama_model_free(self._model)

    def _prepare(self, rows: int, length: int, at_once: int) -> None:
        """Makes an empty context for ``rows`` rows of ``length`` tokens, or empties the one that matches."""
        if self._shape != (rows, length, at_once):
            self._drop_context()
            self._context = self._make_context(rows, length, at_once)
            self._batch = llama_cpp.llama_batch_init(at_once, 0, 1)
            self._shape = (rows, length, at_once)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def _make_context(self, rows: int, length: int, at_once: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = rows
        params.n_ctx = rows * (-(-length // _CELLS) * _CELLS)
        params.n_batch = max(at_once, _CELLS)
        params.n_threads = params.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        return context

    def _drop_context(self) -> None:
        if self._context is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = self._batch = None

    def _step(self, new: list[list[int]], position: int, kept: int) -> np.ndarray:
        """Appends to each row; returns the logits after its last ``kept`` tokens, (rows · kept, vocabulary).

        The array is llama.cpp's own memory, valid until the next step.
        """
        batch, count = self._batch, 0
        for row, ids in enumerate(new):
            for offset, id_ in enumerate(ids):
                batch.token[count], batch.pos[count] = id_, position + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = offset >= len(ids) - kept
                count += 1
        batch.n_tokens = count
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp failed on a batch")
        logits = llama_cpp.llama_get_logits(self._context)  # those asked for, in the batch's order
        return np.ctypeslib.as_array(logits, shape=(len(new) * kept, self._vocabulary))
