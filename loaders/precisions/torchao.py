"""torchao-int8 and torchao-int4: torchao's own tensors and products, under ``transformers``' forward pass.

``TorchAoConfig`` of ``transformers`` quantizes only nn.Linear: GPT-2's Conv1D layers would stay as they are,
so they are converted here and torchao is called directly. The head is not quantized.

Of torchao's configurations these are fast without ``torch.compile``, and a row's product doesn't depend on
the other rows (both measured with torchao 0.18): int8 weights multiplied in bfloat16, and in groups of 32
weights int4 by HQQ, in bfloat16 too. Others dequantize the whole matrix for every product, or sum rows in
another order in another batch. On a CPU without bfloat16 torchao-int8 quantizes each row of activations.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.cuda.memory import device_map
from loaders.footprint import count_parameters, linear_weights, measure, reasons
from loaders.layers.conv1d import to_linear
from loaders.layers.linear_layers import inner_layers, none_to_quantize, shape_of
from loaders.layers.norm_folding import fold_into_weights
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.select import runner_for

if TYPE_CHECKING:
    from loaders.layers.torchao_layers import Kind

_INT4_CARD = (8, 0)  # compute capability
_GROUP, _OUTPUTS = 32, 16  # multiples that int4 layers must have of inputs and of outputs
_SCALES = {"torchao-int8": 5, "torchao-int4": 4}  # bytes of a scale and a zero point


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if find_spec("torchao") is None:
        return Availability("torchao is not installed", "pip install 'bitdial[torchao]'")
    if device == "cpu":
        return Availability()
    if not torch.cuda.is_available():
        return Availability("there is no CUDA device")
    if precision == "torchao-int4" and torch.cuda.get_device_capability() < _INT4_CARD:
        return Availability("torchao's int4 product needs a card of compute capability 8.0")
    return Availability()


def refusal(precision: str, spec: ModelSpec) -> str | None:
    model = meta_model(spec)
    if precision == "torchao-int4":
        for name, layer in inner_layers(model):
            outputs, inputs = shape_of(layer)
            if inputs % _GROUP or outputs % _OUTPUTS:
                return (
                    f"{name} has {inputs} inputs and {outputs} outputs, no multiples of {_GROUP} and "
                    f"{_OUTPUTS}; torchao-int8 takes any"
                )
    return none_to_quantize(model)


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    inner, scales = linear_weights(model), 0
    for _, layer in inner_layers(model):
        outputs, inputs = shape_of(layer)
        scales += outputs if precision == "torchao-int8" else outputs * inputs // _GROUP
    rest: int = (count_parameters(model) - inner) * rest_dtype(spec).itemsize
    return rest + (inner if precision == "torchao-int8" else inner // 2) + scales * _SCALES[precision]


def rest_dtype(spec: ModelSpec) -> torch.dtype:
    """The type of the rest: in bfloat16, attention on a CPU depends on the batch."""
    return torch.float32 if spec.device == "cpu" else torch.bfloat16


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    from loaders.layers.torchao_layers import GROUP, TorchAOLinear  # torchao is optional

    dtype = rest_dtype(spec)
    where = device_map(spec, estimate_bytes(precision, spec))
    model = load_pretrained(spec, progress, dtype=dtype, device_map=where)
    parameters, targets = count_parameters(model), list(inner_layers(model))
    kind, compute = _scheme(precision, spec)
    factors = fold_into_weights(model, head=False)
    for done, (name, module) in enumerate(targets, 1):
        layer = TorchAOLinear(to_linear(module), kind, compute, factors.get(name))
        model.set_submodule(name, layer)
        progress("quantizing", done, len(targets))
    del targets, module
    footprint = measure(model, parameters, reasons(model, f"the head is kept in {str(dtype)[6:]}"))
    details: dict[str, Any] = {
        "rest": str(dtype),
        "scheme": kind,
        "compute_dtype": str(compute),
        "kernels": "torchao",
    }
    if precision == "torchao-int4":
        details["block_size"] = GROUP
    return LoadedModel(precision, runner_for(model, spec), footprint, details=details)


def _scheme(precision: str, spec: ModelSpec) -> tuple["Kind", torch.dtype]:
    """What is quantized, and the type of the products."""
    if precision == "torchao-int4":
        return "int4-weight-only", torch.bfloat16
    if spec.device == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return "int8-weight-only", torch.bfloat16
    return "int8-dynamic", torch.float32
