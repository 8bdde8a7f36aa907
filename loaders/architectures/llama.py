"""Llama and the models built like it: Mistral, Qwen2, Qwen3, Phi-3, Gemma."""

from dataclasses import replace
from typing import Any

from loaders.architectures.architecture import (
    Architecture,
    BlockNames,
    UnsupportedArchitecture,
    activation,
    check_rope,
    windows,
)
from loaders.kernels.decoder_layers import Shape

_BLOCK = BlockNames(
    before_attention="input_layernorm",
    qkv=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    attention_out="self_attn.o_proj",
    before_mlp="post_attention_layernorm",
    mlp_in=["mlp.gate_proj", "mlp.up_proj"],
    down="mlp.down_proj",
)


def _decoder(config: Any, model_class: str, block: BlockNames = _BLOCK) -> Architecture:
    check_rope(config)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        model_class=model_class,
        shape=Shape(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=dim,
            inner=config.intermediate_size,
            norm="rms",
            epsilon=config.rms_norm_eps,
            activation=activation(config.hidden_act),
            gated=True,
            attention_scale=dim**-0.5,
        ),
        windows=windows(config),
        block=block,
        tokens="model.embed_tokens",
        blocks="model.layers",
        last="model.norm",
        rotary="model.rotary_emb",
    )


def llama(config: Any) -> Architecture:
    return _decoder(config, "LlamaForCausalLM")


def mistral(config: Any) -> Architecture:
    return _decoder(config, "MistralForCausalLM")


def qwen2(config: Any) -> Architecture:
    return _decoder(config, "Qwen2ForCausalLM")


def qwen3(config: Any) -> Architecture:
    """Query and key of each head are normalized."""
    block = replace(_BLOCK, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
    return _decoder(config, "Qwen3ForCausalLM", block)


def phi3(config: Any) -> Architecture:
    """Projections are fused."""
    block = replace(_BLOCK, qkv=["self_attn.qkv_proj"], mlp_in=["mlp.gate_up_proj"])
    return _decoder(config, "Phi3ForCausalLM", block)


def gemma(config: Any) -> Architecture:
    """Norms multiply by 1 + weight, and token embeddings are scaled by the root of the width."""
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedArchitecture("its attention is bidirectional")
    found = _decoder(config, "GemmaForCausalLM")
    shape = replace(found.shape, embedding_scale=config.hidden_size**0.5)
    return replace(found, shape=shape, norm_offset=1.0)
