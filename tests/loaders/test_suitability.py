"""Whether a precision can be made of a checkpoint: known from its configuration, and true."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import PrecisionUnavailable
from server.__main__ import main
from tests import checkpoints

SIZES: dict[str, Any] = {
    "vocab_size": checkpoints.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
EXPERTS = {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LATENT = {
    "intermediate_size": 128, "num_key_value_heads": 4, "first_k_dense_replace": 2, "kv_lora_rank": 64,
    "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
BART = {
    "d_model": 64, "vocab_size": 320, "max_position_embeddings": 64, "encoder_layers": 1, "decoder_layers": 3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}  # fmt: skip

ONNX = {"onnx-fp32", "onnx-int8", "onnx-static-int8", "onnx-int4"}
LITERT = {"litert-fp32", "litert-fp16", "litert-int8", "litert-full-int8"}
BLOCKS_OF_64 = {"nf4", "fp4", "int4", "qat-int8", "qat-int4"}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, set[str]]]] = {
    "llama": ("llama", GATED, {}),
    "opt": ("opt", {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}, {}),
    "gpt_neox": ("gpt_neox", {**SIZES, "intermediate_size": 128}, {}),
    "narrow": (
        "gpt2",
        {**SIZES, "hidden_size": 48, "num_attention_heads": 2},
        {
            "transformer.h.0.attn.c_attn has 48 inputs, no multiple of 64": BLOCKS_OF_64,
            "c_attn has 48 inputs and 144 outputs, no multiples of 32 and 16": {"torchao-int4"},
        },
    ),
    "narrow heads": (
        "gpt2",
        {**SIZES, "hidden_size": 40},
        {
            "c_attn has 40 inputs, no multiple of 64": BLOCKS_OF_64,
            "c_attn has 40 inputs and 120 outputs, no multiples": {"torchao-int4"},
            "no linear layer of a width that the compiled kernels take": {"static-int8"},
            "its attention heads are 10 wide; ONNX Runtime takes multiples of 8": ONNX,
        },
    ),
    "a mixture of experts": (
        "mixtral",
        EXPERTS,
        {
            "most weights of its blocks are in no linear layers": {"int4"},
            "is in no linear layer (as the experts of a mixture are)": {"qat-int8", "qat-int4", *ONNX},
        },
    ),
    "linear layers of its own": (
        "falcon",
        {**SIZES, "alibi": False},
        {
            "all of its linear layers are FalconLinear": {"nf4", "fp4"},
            "0 of its 2 layers compute attention through transformers' interface": ONNX,
        },
    ),
    "attention of its own": (
        "gptj",
        {"vocab_size": 320, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        {"0 of its 2 layers compute attention through transformers' interface": ONNX},
    ),
    "keys wider than values": (
        "deepseek_v3",
        {**SIZES, **LATENT},
        {"its attention has no form in ONNX Runtime's GroupQueryAttention": ONNX},
    ),
    "narrow latents": (
        "deepseek_v3",
        {**SIZES, **LATENT, "kv_lora_rank": 48, "q_lora_rank": 33, "v_head_dim": 12},
        {
            "self_attn.q_b_proj has 33 inputs, no multiple of 64": BLOCKS_OF_64,
            "self_attn.q_a_proj has 64 inputs and 33 outputs, no multiples of 32 and 16": {"torchao-int4"},
            "its attention has no form in ONNX Runtime's GroupQueryAttention": ONNX,
        },
    ),
    "changing positions": (
        "llama",
        {**GATED, "rope_parameters": DYNAMIC},
        {"its rotary embeddings (dynamic) depend on the length of a text": ONNX},
    ),
    "convolutions beside attention": (
        "lfm2",
        {**GATED, "layer_types": ["conv", "full_attention"]},
        {
            "it has conv layers": ONNX | LITERT,
            "model.layers.0.conv.conv.weight is in no linear layer": {"qat-int8", "qat-int4"},
        },
    ),
    "weights that are read": (
        "mamba",
        {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 64},
        {
            "it has linear_attention layers": ONNX | LITERT,
            "A_log is in no linear layer": {"qat-int8", "qat-int4"},
            "the model's code multiplies with backbone.layers.0.mixer.dt_proj's weight itself": {
                "int8",
                "nf4",
                "fp4",
                "int4",
                "dynamic-int8",
                "static-int8",
                "torchao-int8",
                "torchao-int4",
            },
        },
    ),
    "no list of blocks": (
        "bart",
        BART,
        {
            "BartForCausalLM has no list of blocks": {"int4", "onnx-int4"},
            "3 of its 1 layers compute attention": ONNX - {"onnx-int4"},
        },
    ),
}
"""Model type, configuration, and the precisions that are refused by a part of the reason."""

needs_kernels = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))


@pytest.fixture
def spec_of(tmp_path: Path) -> Callable[[str, dict[str, Any]], ModelSpec]:
    def make(family: str, sizes: dict[str, Any]) -> ModelSpec:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
        return ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / "tiny"))), slots=2)

    return make


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_be_made_of_a_checkpoint_says_so_before_any_work(
    name: str, spec_of: Callable[[str, dict[str, Any]], ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, sizes, refused = MODELS[name]
    spec, here = spec_of(family, sizes), set(loaders.available("cpu"))
    expected = {precision: why for why, names in refused.items() for precision in names & here}
    found = {precision: loaders.offered(precision, spec).reason for precision in here}
    assert {precision for precision, why in found.items() if why is not None} == expected.keys()
    monkeypatch.setattr("loaders.pretrained.AutoModelForCausalLM.from_pretrained", None)
    for precision, why in expected.items():
        assert why in str(found[precision])
        with pytest.raises(PrecisionUnavailable, match=rf"^{precision} can't be served here: "):
            loaders.load(precision, spec)


@needs_kernels
@pytest.mark.parametrize("name", [name for name, (_, _, refused) in MODELS.items() if refused])
def test_what_is_offered_can_be_loaded(
    name: str, spec_of: Callable[[str, dict[str, Any]], ModelSpec]
) -> None:
    """Of precisions without files, which take long to make."""
    family, sizes, refused = MODELS[name]
    spec = spec_of(family, sizes)
    offered = [one for one in loaders.direct("cpu") if loaders.offered(one, spec).ok]
    assert {"fp32", "int8", "dynamic-int8"} <= {*offered}.union(*refused.values())
    for precision in offered:
        loaded = loaders.load(precision, spec)
        assert loaded.runner.score([5, 6, 7]).isfinite().all()
        loaded.close()


@needs_kernels
def test_commands_tell_the_reason(
    spec_of: Callable[[str, dict[str, Any]], ModelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(spec_of("gpt2", {**SIZES, "hidden_size": 48}).checkpoint.folder)
    reason = "transformer.h.0.attn.c_attn has 48 inputs, no multiple of 64"
    assert main(["precisions", "--model", folder]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[3:]}
    assert f"no: {reason}" in lines["int4"]
    assert lines["int8"].endswith("yes")
    for code, *arguments in (
        (1, "generate", "a", "--precision", "nf4"),
        (1, "compare", "a", "--precisions", "int8,nf4"),
        (1, "quantize", "--method", "nf4", "--out", f"{folder}/new"),
        (1, "quantize", "--method", "qat-int8"),
        (2, "serve", "--port", "0", "--precision", "nf4"),
        (2, "serve", "--port", "0", "--precisions", "fp32,nf4"),
    ):
        assert main([*map(str, arguments), "--model", folder]) == code
        said = capsys.readouterr()
        assert f"can't be served here: {reason}" in said.err
        assert not said.out


@needs_kernels
def test_all_precisions_are_those_that_can_be_made(
    spec_of: Callable[[str, dict[str, Any]], ModelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(spec_of("gpt2", {**SIZES, "hidden_size": 48}).checkpoint.folder)
    assert main(["compare", "a", "--max-new-tokens", "2", "--precisions", "all", "--model", folder]) == 0
    rows = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert {"fp32", "int8", "dynamic-int8"} <= rows
    assert not {"nf4", "fp4"} & rows


def test_a_layer_of_that_name_that_the_model_calls_is_quantized(
    spec_of: Callable[[str, dict[str, Any]], ModelSpec],
) -> None:
    """Doge's ``dt_proj`` is a layer as any other; Mamba's weight of this name is read."""
    spec = spec_of("doge", {**GATED, "num_experts": 4, "num_experts_per_tok": 2})
    assert "model.layers.0.self_attn.dt_proj" in loaders.load("dynamic-int8", spec).footprint.quantized
