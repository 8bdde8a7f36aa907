"""Small random models of every architecture that the compiled forward pass computes."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, CONTEXT = 133, 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT,
    "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2,
    "hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}


def _rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {
        "vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 192, "n_layer": 2, "n_head": 4,
        "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
    }),
    "llama": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("llama", {**_GROUPED, **_rope("linear", factor=4.0)}),
    "llama 3": ("llama", {
        **_GROUPED,
        **_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    }),
    "llama, yarn": ("llama", {
        **_GROUPED, "head_dim": 64, **_rope("yarn", factor=4.0, original_max_position_embeddings=32),
    }),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 37}),
    "qwen2": ("qwen2", {**_GROUPED, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 48}),
    "phi3": ("phi3", {**_GROUPED, "pad_token_id": 0}),
    "gemma": ("gemma", {**_GROUPED, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 40}),
    "gpt_neox": ("gpt_neox", _COMMON),
    "gpt_neox, sequential": ("gpt_neox", {
        **_COMMON, "use_parallel_residual": False, "hidden_act": "gelu_new",
    }),
    "opt": ("opt", {
        "vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 192, "ffn_dim": 320,
        "num_attention_heads": 6, "init_std": 0.2, "word_embed_proj_dim": 192,
    }),
}  # fmt: skip
"""(model type, configuration) by name."""


def make(name: str, **changes: Any) -> PreTrainedModel:
    """A model in evaluation mode whose norms and biases are random as well."""
    torch.manual_seed(0)
    kind, values = CONFIGS[name]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**values, **changes})
    )
    with torch.no_grad():
        for at, parameter in model.named_parameters():
            if at.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in at or ".ln_" in at:
                parameter.normal_(0 if kind == "gemma" else 1, 0.3)
    return model.eval().requires_grad_(False)
