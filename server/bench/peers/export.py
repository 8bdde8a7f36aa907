"""A checkpoint as NumPy arrays and JSON, which the peers' converters read without torch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loaders.base import Checkpoint, ModelSpec, ignore_progress
from loaders.pretrained import load_pretrained
from server.bench.errors import BenchError

DESCRIPTION = "model.json"
ROPE_FACTORS = "rope_factors"
"""Of Llama 3's scaling: by how much each rotary frequency is divided, (head size ÷ 2,)."""
_SCALINGS = ("default", "linear", "yarn", "llama3")
_YARN_IGNORED = {"attention_factor", "mscale", "mscale_all_dim", "truncate"}


@dataclass(frozen=True)
class Export:
    """A checkpoint written for the peers.

    Args:
        engines: those that compute it as ``transformers`` does.
    """

    folder: Path
    engines: tuple[str, ...]


def export(checkpoint: Checkpoint, folder: Path, longest: int) -> Export:
    """Writes every weight as float32 ``NAME.npy``, and the configuration as JSON.

    A tied head is not written. Names are those of ``transformers``, below its base model.

    Args:
        longest: most tokens of a sequence that will be computed.

    Raises:
        BenchError: the converters don't know the architecture, or the peers don't compute it alike.
        CheckpointError: it can't be loaded.
    """
    if checkpoint.architecture not in _FAMILIES:
        known = ", ".join(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in _FAMILIES)
        raise BenchError(f"peers are measured on {known} checkpoints; this is a {checkpoint.architecture}")
    name, describe = _FAMILIES[checkpoint.architecture]
    facts = {
        "architecture": name,
        "name": checkpoint.model_id,
        "vocabulary": checkpoint.vocabulary,
        "end": min(checkpoint.eos_ids, default=checkpoint.vocabulary - 1),
        **describe(checkpoint.config),
    }
    if why := _difference(checkpoint.config, facts, longest):
        raise BenchError(f"the peers would not compute this model: {why}")
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(
        load_pretrained(ModelSpec(checkpoint), ignore_progress, dtype=torch.float32), folder, facts
    )
    (folder / DESCRIPTION).write_text(json.dumps(facts))
    scaled = facts.get("rope", {}).get("rope_type", "default") != "default"
    return Export(folder, ("llama.cpp",) if scaled else ("llama.cpp", "CTranslate2"))


def _write_weights(model: Any, folder: Path, facts: dict[str, Any]) -> None:
    for name, tensor in model.base_model.named_parameters():
        _save(folder, name, tensor)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if head.data_ptr() != embedding.data_ptr():
        _save(folder, "lm_head.weight", head)
    if facts.get("rope", {}).get("rope_type") == "llama3":
        scaled = model.base_model.rotary_emb.inv_freq.float()
        steps = torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled))
        _save(folder, ROPE_FACTORS, facts["rope"]["rope_theta"] ** -steps / scaled)


def _save(folder: Path, name: str, tensor: torch.Tensor) -> None:
    np.save(folder / f"{name}.npy", tensor.detach().float().numpy())


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "layers": config.n_layer,
        "heads": config.n_head,
        "width": config.n_embd,
        "inner": config.n_inner or 4 * config.n_embd,
        "context": config.n_positions,
        "epsilon": config.layer_norm_epsilon,
    }


def _rotary(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    return {
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": config.num_key_value_heads or heads,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "context": config.max_position_embeddings,
        "epsilon": config.rms_norm_eps,
        "rope": dict(config.rope_parameters),
    }


_FAMILIES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "GPT2LMHeadModel": ("gpt2", _gpt2),
    "LlamaForCausalLM": ("llama", _rotary),
    "MistralForCausalLM": ("llama", _rotary),
    "Qwen2ForCausalLM": ("qwen2", _rotary),
    "Qwen3ForCausalLM": ("qwen3", _rotary),
}
"""By ``transformers``' class: llama.cpp's name of the architecture, and what its converter needs to know."""


def _difference(config: Any, facts: dict[str, Any], longest: int) -> str | None:
    """What the checkpoint has that the converters don't write, or the peers leave out."""
    activation = "gelu_new" if facts["architecture"] == "gpt2" else "silu"
    if (own := getattr(config, "hidden_act", None) or config.activation_function) != activation:
        return f"its activation is {own}"
    if (window := getattr(config, "sliding_window", None)) is not None and window < longest:
        return f"its attention slides over {window} tokens, fewer than the {longest} of a sequence"
    if (rope := facts.get("rope")) is None:
        return None
    if rope.get("rope_type", "default") not in _SCALINGS:
        return f"its rotary scaling is {rope['rope_type']!r}"
    if rope.get("rope_type") == "llama3" and facts["architecture"] != "llama":
        return f"llama.cpp has Llama 3's rotary scaling for Llama alone, not for {facts['architecture']}"
    if rope.get("rope_type") == "yarn" and (
        own := _YARN_IGNORED & {key for key in rope if rope[key] is not None}
    ):
        return f"llama.cpp ignores {', '.join(sorted(own))} of its YaRN"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head"
    if facts["architecture"] == "qwen2" and facts["heads"] * facts["head_size"] != facts["width"]:
        return "its heads are not as wide together as the model"
    return None
