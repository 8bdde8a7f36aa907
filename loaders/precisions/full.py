"""fp32, bf16, fp16: unquantized weights in that type."""

from typing import Any, Literal

import torch

from loaders import kernels
from loaders.base import DTYPES, Availability, LoadedModel, ModelSpec, Progress
from loaders.cuda.memory import device_map
from loaders.footprint import count_parameters, measure
from loaders.layers.native_linear import FORMATS, adopt
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.select import runner_for


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if device == "cuda" and not torch.cuda.is_available():
        return Availability("there is no CUDA device")
    if device == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
        return Availability("this card has no bfloat16")
    return Availability()


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    return count_parameters(meta_model(spec)) * DTYPES[precision].itemsize


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    if precision == "fp32":
        disable_tf32()
    where = device_map(spec, estimate_bytes(precision, spec))
    model = load_pretrained(spec, progress, dtype=DTYPES[precision], device_map=where)
    parameters = count_parameters(model)
    native = spec.device == "cpu" and adopt(model, progress)
    footprint = measure(model, parameters)
    details: dict[str, Any] = {
        "dtype": str(model.dtype),
        "kernels": kernels.describe() if spec.device == "cpu" else "torch",
    }
    if spec.device == "cuda" and precision == "fp32":
        details["tf32"] = torch.backends.cuda.matmul.allow_tf32
    if native and (library := kernels.get()) is not None:
        details["compute_dtype"] = f"torch.{library.computes_in(FORMATS[DTYPES[precision]])}"
    return LoadedModel(precision, runner_for(model, spec), footprint, details=details)


def disable_tf32() -> None:
    """Turns TensorFloat-32 off for the whole process: it has 10 bits of mantissa, fp32 has 23."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
