"""GPT-2."""

from typing import Any

from loaders.architectures.architecture import (
    Architecture,
    BlockNames,
    UnsupportedArchitecture,
    activation,
)
from loaders.kernels.decoder_layers import Shape


def gpt2(config: Any) -> Architecture:
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        raise UnsupportedArchitecture("its attention is not GPT-2's standard one")
    dim = config.n_embd // config.n_head
    return Architecture(
        model_class="GPT2LMHeadModel",
        shape=Shape(
            width=config.n_embd,
            heads=config.n_head,
            kv_heads=config.n_head,
            head_dim=dim,
            inner=4 * config.n_embd if config.n_inner is None else config.n_inner,
            norm="layer",
            epsilon=config.layer_norm_epsilon,
            activation=activation(config.activation_function),
            gated=False,
            attention_scale=dim**-0.5,
        ),
        windows=[None] * config.n_layer,
        block=BlockNames(
            before_attention="ln_1",
            qkv=["attn.c_attn"],
            attention_out="attn.c_proj",
            before_mlp="ln_2",
            mlp_in=["mlp.c_fc"],
            down="mlp.c_proj",
        ),
        tokens="transformer.wte",
        positions="transformer.wpe",
        blocks="transformer.h",
        last="transformer.ln_f",
    )
