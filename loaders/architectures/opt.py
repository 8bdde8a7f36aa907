"""OPT."""

from typing import Any

from loaders.architectures.architecture import (
    Architecture,
    BlockNames,
    UnsupportedArchitecture,
    activation,
)
from loaders.kernels.decoder_layers import Shape

_EPSILON = 1e-5  # nn.LayerNorm's default, which the model class uses
_FIRST_POSITION = 2  # OPTLearnedPositionalEmbedding.offset


def opt(config: Any) -> Architecture:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise UnsupportedArchitecture("its norms are behind attention and MLP")
    if config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedArchitecture("its embeddings are projected to another width")
    if not config.layer_norm_elementwise_affine:
        raise UnsupportedArchitecture("its norms have no weights")
    dim = config.hidden_size // config.num_attention_heads
    return Architecture(
        model_class="OPTForCausalLM",
        shape=Shape(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=dim,
            inner=config.ffn_dim,
            norm="layer",
            epsilon=_EPSILON,
            activation=activation(config.activation_function),
            gated=False,
            attention_scale=dim**-0.5,
        ),
        windows=[None] * config.num_hidden_layers,
        block=BlockNames(
            before_attention="self_attn_layer_norm",
            qkv=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            attention_out="self_attn.out_proj",
            before_mlp="final_layer_norm",
            mlp_in=["fc1"],
            down="fc2",
        ),
        tokens="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        first_position=_FIRST_POSITION,
        blocks="model.decoder.layers",
        last="model.decoder.final_layer_norm",
    )
