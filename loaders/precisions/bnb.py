"""int8 (LLM.int8), nf4 and fp4 by bitsandbytes, through ``BitsAndBytesConfig``.

``transformers`` transposes GPT-2's Conv1D layers for it. The head is not quantized, tied to the embedding or
not; ``llm_int8_skip_modules`` replaces the default list, so the head is always in it.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders import kernels
from loaders.artifacts import Recipe
from loaders.base import DTYPES, Availability, LoadedModel, ModelSpec, Progress
from loaders.cuda.memory import device_map
from loaders.errors import CheckpointError
from loaders.footprint import count_parameters, linear_weights, measure, reasons
from loaders.kernels.matrix import ACTIVATION_GROUP
from loaders.layers.conv1d import to_linear
from loaders.layers.huge_pages import Arena
from loaders.layers.linear_layers import inner_layers, none_to_quantize, uneven_inputs
from loaders.layers.native_linear import adopt
from loaders.layers.norm_folding import fold_norms
from loaders.precisions.head import head_type, head_weight, own_head_bytes, replace_head
from loaders.pretrained import load_pretrained, meta_model, misfit, save_pretrained
from loaders.runners.select import is_compiled, runner_for

BLOCK = 64  # weights that share one absmax
_THRESHOLD_NOTE = (
    "an outlier takes the precision of its whole row of activations; INT8_THRESHOLD=6 keeps them in fp16, "
    "but then no step is captured, and what runs beside a sequence changes its tokens"
)


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    if find_spec("bitsandbytes") is None:
        return Availability("bitsandbytes is not installed", "pip install 'bitsandbytes>=0.50'")
    if device == "cuda" and not torch.cuda.is_available():
        return Availability("there is no CUDA device")
    return Availability()


def refusal(precision: str, spec: ModelSpec) -> str | None:
    model = meta_model(spec)
    if (why := none_to_quantize(model)) is not None:
        return why
    layers = dict(inner_layers(model))
    if not _is_folded(precision, spec):  # transformers replaces no layers of subclasses
        kinds = sorted({type(layer).__name__ for layer in layers.values()})
        layers = {name: one for name, one in layers.items() if type(one) in (nn.Linear, Conv1D)}
        if not layers:
            return f"all of its linear layers are {', '.join(kinds)}, which bitsandbytes has no form for"
    blocks = spec.device == "cpu" and precision != "int8"  # on a GPU bitsandbytes unpacks other widths
    if blocks and (why := uneven_inputs(layers.items(), BLOCK)) is not None:
        return f"{why}, the weights that share a scale; int8 and dynamic-int8 take any width"
    return None


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    inner = linear_weights(model)
    kept = rest_dtype(precision, spec)
    rest: int = (count_parameters(model) - inner) * kept.itemsize
    if (of_head := head_type(precision, spec, model, kept)) != kept:
        rest += own_head_bytes(model, kept, of_head)
    return rest + (inner if precision == "int8" else inner // 2 + inner // BLOCK * 4)


PREPARED = False  # quantizing takes no longer than reading what was saved


def recipe(precision: str, spec: ModelSpec) -> Recipe:
    nested = None if precision == "int8" else spec.double_quantization
    return Recipe(precision, {"format": 1, "double_quantization": nested}, ("bitsandbytes",))


def make(precision: str, spec: ModelSpec, folder: Path, progress: Progress) -> None:
    """Writes a checkpoint that ``from_pretrained`` of transformers reads."""
    config = quantization_config(precision, spec)
    model = load_pretrained(
        spec, progress, dtype=_own_dtype(spec), device_map=spec.device, quantization_config=config
    )
    _check_layers(model, precision, spec.checkpoint.model_id)
    save_pretrained(model, folder, progress)


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    # bitsandbytes is optional; without this, its layers are taken for their base class, nn.Linear
    from loaders.layers.bitsandbytes_layers import take_any_shape

    rest = rest_dtype(precision, spec)
    saved = spec.checkpoint.saved is not None
    if _is_folded(precision, spec):
        model = _load_folded(spec, progress)
    else:
        model = load_pretrained(
            spec,
            progress,
            dtype=torch.float32 if spec.device == "cpu" else rest,
            device_map=device_map(spec, estimate_bytes(precision, spec)),
            # transformers reads the configuration of a saved one from its config.json
            **({} if saved else {"quantization_config": quantization_config(precision, spec)}),
        )
        if spec.device == "cpu":
            take_any_shape(model)
    _check_layers(model, precision, spec.checkpoint.model_id)
    four_bit = {} if precision == "int8" else _four_bit_details(model)
    arena, of_head = Arena(), head_type(precision, spec, model, rest)
    exact = head_weight(model) if of_head != rest else None
    if spec.device == "cpu":
        _cast(model, rest)
    if exact is not None:  # after casting: the kernels hold the addresses of a layer's tensors
        replace_head(model, exact, of_head, arena)
        del exact
    native = spec.device == "cpu" and adopt(model, progress, arena)
    runner = runner_for(model, spec)  # before counting: bitsandbytes repacks weights when they are first used
    parameters = count_parameters(meta_model(spec))
    reason = f"the head is kept in {str(of_head).removeprefix('torch.')}"
    footprint = measure(model, parameters, reasons(model, reason))
    details: dict[str, Any] = {
        "rest": str(rest),
        "head": str(of_head),
        "compute_dtype": _native_compute(precision) if native else str(_compute_dtype(spec)),
        "kernels": kernels.describe() if spec.device == "cpu" else "bitsandbytes",
    }
    if precision == "int8":
        details["outlier_threshold"] = spec.int8_threshold
        grouped = native and not spec.int8_threshold
        details["activation_group_size"] = ACTIVATION_GROUP if grouped else "row"
        details["weight_scales_per_output"] = 1
        if spec.device == "cuda" and not spec.int8_threshold:
            details["note"] = _THRESHOLD_NOTE
    return LoadedModel(precision, runner, footprint, details=details | four_bit)


def _four_bit_details(model: PreTrainedModel) -> dict[str, Any]:
    """Read from a layer: a saved checkpoint may have been made with other options than this server's."""
    weights = (getattr(module, "weight", None) for module in model.modules())
    state = next(one for w in weights if (one := getattr(w, "quant_state", None)) is not None)
    return {"block_size": state.blocksize, "double_quantization": state.nested}


def _is_folded(precision: str, spec: ModelSpec) -> bool:
    """Whether the layers are quantized here, after folding, and not by transformers."""
    on_a_cpu = precision == "int8" and spec.device == "cpu"
    return on_a_cpu and not spec.int8_threshold and spec.checkpoint.saved is None


def _load_folded(spec: ModelSpec, progress: Progress) -> PreTrainedModel:
    """The model in int8 by bitsandbytes' own quantizer, after its norms were folded into the weights."""
    from loaders.layers.bitsandbytes_layers import int8_layer  # bitsandbytes is optional

    model = load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu")
    names = [name for name, _ in inner_layers(model)]
    factors = fold_norms(model, head=False)
    for done, name in enumerate(names, 1):
        linear = to_linear(model.get_submodule(name))
        model.set_submodule(name, int8_layer(linear.weight.detach(), linear.bias, factors.get(name)))
        progress("quantizing", done, len(names))
    return model


def quantization_config(precision: str, spec: ModelSpec) -> Any:
    """The ``quantization_config`` of ``from_pretrained`` for the precision."""
    model = meta_model(spec)
    head = model.get_output_embeddings()
    skip = [name for name, module in model.named_modules() if module is head]
    if precision == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=spec.int8_threshold, llm_int8_skip_modules=skip
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision,
        bnb_4bit_compute_dtype=_compute_dtype(spec),
        bnb_4bit_use_double_quant=spec.double_quantization,
        llm_int8_skip_modules=skip,
    )


def rest_dtype(precision: str, spec: ModelSpec) -> torch.dtype:
    """The type of the tensors that are not quantized.

    On a CPU bf16 if the compiled forward pass reads it, since the head is most of a small model's memory
    traffic; otherwise fp32. On a GPU the type that the kernels accept without casting.
    """
    if spec.unquantized_dtype != "auto":
        return DTYPES[spec.unquantized_dtype]
    if spec.device == "cpu":
        compiled = is_compiled(spec.checkpoint.config)
        return torch.bfloat16 if compiled and not spec.int8_threshold else torch.float32
    return torch.float16 if precision == "int8" else _sixteen_bits()


def _own_dtype(spec: ModelSpec) -> torch.dtype:
    """The type of the checkpoint's tensors: those that stay as they are lose nothing."""
    kept = spec.checkpoint.config.dtype
    return kept if kept in DTYPES.values() else torch.float32


def _check_layers(model: nn.Module, precision: str, name: str) -> None:
    """Raises CheckpointError for quantized layers of a wrong shape, and if there are none.

    ``from_pretrained`` checks neither.
    """
    from loaders.layers.bitsandbytes_layers import layer_class, weight_shape  # bitsandbytes is optional

    quantized = layer_class(precision)
    layers: dict[str, Any] = {at: one for at, one in model.named_modules() if isinstance(one, quantized)}
    if not layers:
        raise CheckpointError(f"{name} has no layer that {precision} can quantize")
    if misfits := [
        at for at, one in layers.items() if weight_shape(one) != (one.out_features, one.in_features)
    ]:
        raise misfit(name, misfits)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the float32 tensors that remain after quantizing, which used the checkpoint's own values."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def _native_compute(precision: str) -> str:
    library = kernels.get()
    assert library is not None
    return f"torch.{library.computes_in('int8' if precision == 'int8' else 'four-bit')}"


def _compute_dtype(spec: ModelSpec) -> torch.dtype:
    """bf16 if the CPU has instructions for it: with fp32, the fused kernels support only few rows."""
    if spec.device == "cuda":
        return _sixteen_bits()
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _sixteen_bits() -> torch.dtype:
    """The type that the GPU has instructions for: before Ampere, bf16 is emulated in fp32."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
