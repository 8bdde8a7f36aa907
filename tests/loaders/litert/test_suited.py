"""What LiteRT's precisions say of a model before it is converted; no converter is needed for that."""

from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoConfig

import loaders
from loaders.base import Checkpoint, ModelSpec
from tests import checkpoints

SIZES: dict[str, Any] = {
    "vocab_size": checkpoints.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
GPTJ = {"vocab_size": 320, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
LATENT = {
    **SIZES, "num_key_value_heads": 4, "first_k_dense_replace": 2, "kv_lora_rank": 64, "q_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}}


@pytest.mark.parametrize(
    ("family", "sizes", "why"),
    [
        ("llama", SIZES, None),
        ("gemma2", {**SIZES, "head_dim": 16}, None),
        ("biogpt", SIZES, None),
        ("llama", {**SIZES, "intermediate_size": 251}, "one of its dimensions is 251"),
        ("llama", {**SIZES, "vocab_size": 2**17, "hidden_size": 4096}, "GiB of weights in float32"),
        ("mixtral", {**SIZES, "num_local_experts": 4}, "the experts of a mixture are in one tensor"),
        ("phi3", {**SIZES, **LONGROPE, "pad_token_id": 0}, "its rotary embeddings (longrope) depend on"),
        ("gptj", GPTJ, "0 of its 2 layers compute attention through transformers' interface"),
        ("deepseek_v3", LATENT, "its attention has sinks, or values of another width"),
    ],
)
def test_what_can_be_converted_is_known_from_the_configuration(
    family: str, sizes: dict[str, Any], why: str | None
) -> None:
    config = AutoConfig.for_model(family, **sizes)
    spec = ModelSpec(Checkpoint("m", None, Path(), config, family, 64, 320, frozenset(), 0))
    loader = cast(loaders.Selective, loaders.loader("litert-int8"))
    found = loader.refusal("litert-int8", spec)
    assert (found is None) == (why is None)
    assert why is None or why in str(found)
