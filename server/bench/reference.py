"""``transformers``' own ``generate``, loaded and called as usual: the reference for speed."""

import time
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loaders.base import DTYPES, ModelSpec, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.layers.conv1d import to_linear
from loaders.precisions.bnb import quantization_config, rest_dtype
from loaders.pretrained import load_pretrained
from server.bench.worker import BatchEngine, Worker


def main() -> None:
    Worker({"transformers": _make}, {"transformers": version("transformers")}).serve()


def _make(precision: str, settings: dict[str, Any], threads: int) -> BatchEngine:
    """
    Args:
        settings: values of ``ModelSettings``.
    """
    from server.host.threads import compute_with
    from server.settings.server import ModelSettings  # here: without a server its packages are not needed

    compute_with(threads)
    chosen = ModelSettings(**settings)
    return Generate(precision, chosen.spec(open_checkpoint(chosen.model_id, chosen.revision), slots=1))


class Generate:
    """A plain ``transformers`` model in one precision, without this project's layers."""

    def __init__(self, precision: str, spec: ModelSpec, **options: Any) -> None:
        """
        Args:
            options: further arguments of ``generate``.
        """
        self._model: Any = load_reference(precision, spec)
        self._options = options
        self.weights_bytes: int | None = None  # get_memory_footprint is incomplete
        self._model.generation_config.eos_token_id = None  # every row generates all tokens

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[list[float], list[list[int]]]:
        ids = torch.tensor(prompts, device=self._model.device)
        clock = _StepTimes()
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                **self._options,
            )
        return clock.times, output[:, ids.shape[1] :].tolist()

    def score(self, texts: list[list[int]], kept: int) -> np.ndarray:
        """Logits (texts, kept, vocabulary) after the last ``kept`` ids of each text, in float32."""
        with torch.inference_mode():
            logits = self._model(torch.tensor(texts, device=self._model.device), logits_to_keep=kept).logits
        found: np.ndarray = logits.float().cpu().numpy()
        return found

    def close(self) -> None:
        self._model = None


class _StepTimes:
    """A streamer that records the time of each step; ``generate`` passes the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._begun = time.perf_counter()
        self._has_prompt = False

    def put(self, _: Any) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter() - self._begun)
        self._has_prompt = True

    def end(self) -> None:
        pass


REFERENCES = frozenset({*DTYPES, "dynamic-int8", "int8", "nf4", "fp4"})
"""The precisions that ``transformers`` and torch have too."""


def load_reference(precision: str, spec: ModelSpec) -> Any:
    """The model in that precision, one of ``REFERENCES``, loaded by ``transformers`` and torch alone.

    fp32, bf16, fp16: ``from_pretrained``. int8, nf4, fp4: ``BitsAndBytesConfig``, configured by ``spec``.
    dynamic-int8: ``quantize_dynamic``, after replacing GPT-2's Conv1D, which it would skip, by nn.Linear.
    """
    if precision in DTYPES:
        return load_pretrained(spec, ignore_progress, dtype=DTYPES[precision], device_map=spec.device)
    if precision == "dynamic-int8":
        return _quantize_dynamic(load_pretrained(spec, ignore_progress, dtype=torch.float32))
    return load_pretrained(
        spec,
        ignore_progress,
        dtype=torch.float32 if spec.device == "cpu" else rest_dtype(precision, spec),
        device_map=spec.device,
        quantization_config=quantization_config(precision, spec),
    )


def _quantize_dynamic(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, to_linear(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it in favour of torchao
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
