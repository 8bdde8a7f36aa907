"""An exported checkpoint → a float32 GGUF for llama.cpp. Runs in the peers' environment.

Names, keys and the order of rotary rows are those of llama.cpp's convert_hf_to_gguf.py.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from server.bench.peers.exported import Exported

_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "lm_head": "output",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PERMUTED = {"attn_q": "heads", "attn_k": "kv_heads"}
"""Of architecture "llama": the projections that are rotated, and the number of their heads."""


def gguf_name(name: str) -> str:
    """``h.3.attn.c_attn.weight`` → ``blk.3.attn_qkv.weight``; ``layers.3.mlp.up_proj.weight`` likewise."""
    if name == "rope_factors":
        return "rope_freqs.weight"
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith(("h.", "layers.")):
        return f"{_NAMES[stem]}.{kind}"
    _, layer, inner = stem.split(".", 2)
    return f"blk.{layer}.{_NAMES[inner]}.{kind}"


def write_gguf(exported: Exported, file: Path) -> Path:
    """The model in float32, without a tokenizer: prompts are token ids. A tied head is the embedding."""
    facts = exported.facts
    writer = gguf.GGUFWriter(file, facts["architecture"])
    writer.add_name(facts["name"])
    writer.add_context_length(facts["context"])
    writer.add_embedding_length(facts["width"])
    writer.add_feed_forward_length(facts["inner"])
    writer.add_block_count(facts["layers"])
    writer.add_head_count(facts["heads"])
    writer.add_vocab_size(facts["vocabulary"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    if facts["architecture"] == "gpt2":
        writer.add_layer_norm_eps(facts["epsilon"])
    else:
        _describe_rotary(writer, facts)
    for name in exported.names():
        writer.add_tensor(
            gguf_name(name), _in_llama_cpps_order(gguf_name(name), exported.weight(name), facts)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _describe_rotary(writer: Any, facts: dict[str, Any]) -> None:
    rope = facts["rope"]
    writer.add_layer_norm_rms_eps(facts["epsilon"])
    writer.add_head_count_kv(facts["kv_heads"])
    writer.add_key_length(facts["head_size"])
    writer.add_value_length(facts["head_size"])
    writer.add_rope_dimension_count(facts["head_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        _describe_yarn(writer, rope, facts["context"])


def _describe_yarn(writer: Any, rope: dict[str, Any], context: int) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or context)
    optional = {
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for key, add in optional.items():
        if rope.get(key) is not None:
            add(rope[key])


def _in_llama_cpps_order(name: str, array: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    """Rotated rows of architecture "llama": pairs beside each other instead of halves of a head apart.

    The other architectures rotate halves, as ``transformers`` does ("NEOX").
    """
    tensor = name.split(".")[-2]
    if facts["architecture"] != "llama" or tensor not in _PERMUTED:
        return array
    heads = facts[_PERMUTED[tensor]]
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
