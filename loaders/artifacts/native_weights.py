"""A model on the compiled kernels as one safetensors file: codes, scales and all other tensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from loaders.base import ModelSpec, Progress
from loaders.errors import CheckpointError
from loaders.layers.huge_pages import Arena
from loaders.layers.layer_weights import weights_of
from loaders.layers.native_linear import NativeLinear
from loaders.layers.shared_embedding import SharedEmbedding, share_embedding

QUANTIZED = "quantized.safetensors"
_FACTS = "bitdial"  # the only key of the file's metadata: the order of several differs from file to file


def save_native(model: PreTrainedModel, folder: Path) -> None:
    """Writes every tensor of a model whose quantized layers are on the kernels; a shared one once.

    Raises:
        CheckpointError: a quantized layer is not.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, NativeLinear):
            state, layers[name] = module.state()
        elif isinstance(module, SharedEmbedding):
            state = {}
        elif (weights := weights_of(module)) is not None and weights.quantized:
            raise CheckpointError(f"{name} can't be saved: the compiled kernels don't compute it")
        else:
            state = {key: one.detach() for key, one in module.named_parameters(recurse=False)}
            state |= {key: one for key, one in module.named_buffers(recurse=False) if _is_saved(module, key)}
        for key, tensor in state.items():
            full = f"{name}.{key}"
            if (owner := first.setdefault(tensor.data_ptr(), full)) == full or not tensor.numel():
                tensors[full] = tensor.contiguous()
            else:
                tied[full] = owner
    shared = isinstance(model.get_input_embeddings(), SharedEmbedding)
    facts = {"layers": layers, "tied": tied, "embedding in the head": shared}
    save_file(tensors, folder / QUANTIZED, {_FACTS: json.dumps(facts)})


def load_native(spec: ModelSpec, folder: Path, progress: Progress) -> PreTrainedModel:
    """The model that ``save_native`` wrote, in evaluation mode, its tensors in huge pages.

    Raises:
        CheckpointError: the file is not of this model.
    """
    name, arena = spec.checkpoint.model_id, Arena()
    model = empty_model(spec.checkpoint.config)
    try:
        with safe_open(folder / QUANTIZED, framework="pt") as file:
            facts = json.loads(file.metadata()[_FACTS])
            layers, tied = facts["layers"], facts["tied"]
            placed = {key: arena.place(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        placed |= {key: placed[owner] for key, owner in tied.items()}
        for done, (layer, described) in enumerate(layers.items(), 1):
            state = {key: placed.pop(key) for key in [*placed] if key.startswith(f"{layer}.")}
            state = {key.removeprefix(f"{layer}."): tensor for key, tensor in state.items()}
            model.set_submodule(layer, NativeLinear.from_state(state, described))
            progress("loading", done, len(layers))
        if facts["embedding in the head"]:
            share_embedding(model)
        _assign(model, placed)
    except (SafetensorError, OSError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: {QUANTIZED} can't be read, or is not of this model") from error
    arena.move_remaining(model)
    return model.eval()


def empty_model(config: Any) -> PreTrainedModel:
    """The model in float32: buffers have their values; weights are uninitialized, their memory untouched."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _is_saved(module: nn.Module, buffer: str) -> bool:
    return buffer not in module._non_persistent_buffers_set


def _is_native(model: PreTrainedModel, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), NativeLinear)


def _assign(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Replaces the values of parameters and buffers by those in ``tensors``, whatever their type.

    Raises:
        KeyError: one of the model has no value, or one of the values no place.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False) if not _is_native(model, name)}
    if missing := own - tensors.keys():
        raise KeyError(min(missing))
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        holder = model.get_submodule(module)
        if key in holder._parameters:
            holder._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        elif key in holder._buffers:
            holder._buffers[key] = tensor
        else:
            raise KeyError(name)
