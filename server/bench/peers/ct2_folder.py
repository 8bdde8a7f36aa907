"""An exported checkpoint → a folder for CTranslate2, filled in as its own converters do, in float32.

Runs in the peers' environment.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.converters.utils import fuse_linear
from ctranslate2.specs import common_spec, transformer_spec

from server.bench.peers.exported import Exported


def write_ctranslate2(exported: Exported, folder: Path) -> Path:
    """The model in float32; CTranslate2 quantizes when it loads. A token's text is its id."""
    facts = exported.facts
    spec = _gpt2(exported) if facts["architecture"] == "gpt2" else _rotary(exported)
    spec.decoder.scale_embeddings = False
    projection, embeddings = spec.decoder.projection, spec.decoder.embeddings
    projection.weight = (
        exported.weight("lm_head.weight") if exported.has("lm_head.weight") else embeddings.weight
    )
    spec.register_vocabulary([str(id_) for id_ in range(facts["vocabulary"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(facts["end"])
    spec.config.layer_norm_epsilon = facts["epsilon"]
    spec.validate()
    spec.optimize()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    return folder


def _gpt2(exported: Exported) -> Any:
    """Like ``GPT2Loader``."""
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        exported.facts["layers"],
        exported.facts["heads"],
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
    )
    decoder = spec.decoder
    decoder.embeddings.weight = exported.weight("wte.weight")
    decoder.position_encodings.encodings = exported.weight("wpe.weight")
    _fill_norm(exported, decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        _fill_norm(exported, layer.self_attention.layer_norm, f"h.{i}.ln_1")
        _fill_linear(exported, layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        _fill_linear(exported, layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        _fill_norm(exported, layer.ffn.layer_norm, f"h.{i}.ln_2")
        _fill_linear(exported, layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        _fill_linear(exported, layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    return spec


def _rotary(exported: Exported) -> Any:
    """Like ``LlamaLoader``, ``Qwen2Loader`` and ``Qwen3Loader``."""
    facts = exported.facts
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        facts["layers"],
        facts["heads"],
        pre_norm=True,
        activation=common_spec.Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=facts["head_size"],
        rotary_interleave=False,
        rotary_base=facts["rope"]["rope_theta"],
        num_heads_kv=facts["kv_heads"] if facts["kv_heads"] != facts["heads"] else None,
        head_dim=facts["head_size"],
        qk_norm=facts["architecture"] == "qwen3",
    )
    decoder = spec.decoder
    decoder.embeddings.weight = exported.weight("embed_tokens.weight")
    _fill_norm(exported, decoder.layer_norm, "norm")
    for i, layer in enumerate(decoder.layer):
        attention, name = layer.self_attention, f"layers.{i}"
        _fill_norm(exported, attention.layer_norm, f"{name}.input_layernorm")
        if facts["architecture"] == "qwen3":
            _fill_norm(exported, attention.q_norm, f"{name}.self_attn.q_norm")
            _fill_norm(exported, attention.k_norm, f"{name}.self_attn.k_norm")
        parts = [common_spec.LinearSpec() for _ in "qkv"]
        for kind, part in zip("qkv", parts, strict=True):
            _fill_linear(exported, part, f"{name}.self_attn.{kind}_proj")
        fuse_linear(attention.linear[0], parts)
        _fill_linear(exported, attention.linear[1], f"{name}.self_attn.o_proj")
        _fill_norm(exported, layer.ffn.layer_norm, f"{name}.post_attention_layernorm")
        _fill_linear(exported, layer.ffn.linear_0, f"{name}.mlp.gate_proj")
        _fill_linear(exported, layer.ffn.linear_0_noact, f"{name}.mlp.up_proj")
        _fill_linear(exported, layer.ffn.linear_1, f"{name}.mlp.down_proj")
    return spec


def _fill_norm(exported: Exported, spec: Any, name: str) -> None:
    spec.gamma = np.array(exported.weight(f"{name}.weight"))
    if exported.has(f"{name}.bias"):
        spec.beta = np.array(exported.weight(f"{name}.bias"))


def _fill_linear(exported: Exported, spec: Any, name: str) -> None:
    spec.weight = np.array(exported.weight(f"{name}.weight"))
    if exported.has(f"{name}.bias"):
        spec.bias = np.array(exported.weight(f"{name}.bias"))
