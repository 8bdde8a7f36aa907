"""GPT-NeoX (Pythia)."""

from typing import Any

from loaders.architectures.architecture import Architecture, BlockNames, activation, check_rope
from loaders.kernels.decoder_layers import Shape


def gpt_neox(config: Any) -> Architecture:
    check_rope(config)
    dim = config.hidden_size // config.num_attention_heads
    return Architecture(
        model_class="GPTNeoXForCausalLM",
        shape=Shape(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=dim,
            inner=config.intermediate_size,
            norm="layer",
            epsilon=config.layer_norm_eps,
            activation=activation(config.hidden_act),
            gated=False,
            attention_scale=dim**-0.5,
            interleaved=True,
            parallel=config.use_parallel_residual,
        ),
        windows=[None] * config.num_hidden_layers,
        block=BlockNames(
            before_attention="input_layernorm",
            qkv=["attention.query_key_value"],
            attention_out="attention.dense",
            before_mlp="post_attention_layernorm",
            mlp_in=["mlp.dense_h_to_4h"],
            down="mlp.dense_4h_to_h",
        ),
        tokens="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        last="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
    )
