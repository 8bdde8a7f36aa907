"""The peers' files, read by their own libraries; and their environment."""

import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import loaders
from loaders.checkpoint import open_checkpoint
from server.bench.errors import BenchError
from server.bench.peers import environment
from server.bench.peers.export import export
from server.bench.peers.exported import Exported
from server.bench.peers.gguf_file import gguf_name, write_gguf
from server.bench.peers.worker import PAIRS
from tests import checkpoints

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")
    return Exported(export(open_checkpoint(str(folder)), tmp_path / "export", 64).folder)


def field(reader: gguf.GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    assert found is not None, name
    return found.contents()


def test_the_gguf_holds_the_models_weights_under_llama_cpps_names(exported: Exported, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_gguf(exported, tmp_path / "f32.gguf"))
    written = {tensor.name: tensor for tensor in reader.tensors}
    model = checkpoints.gpt2()
    named = dict(model.transformer.named_parameters())
    assert len(written) == len(named) == 2 * 12 + 4
    expected = {
        "token_embd.weight": named["wte.weight"],
        "position_embd.weight": named["wpe.weight"],
        "output_norm.bias": named["ln_f.bias"],
        "blk.0.attn_norm.weight": named["h.0.ln_1.weight"],
        "blk.1.attn_qkv.weight": named["h.1.attn.c_attn.weight"].T,
        "blk.1.attn_qkv.bias": named["h.1.attn.c_attn.bias"],
        "blk.0.attn_output.weight": named["h.0.attn.c_proj.weight"].T,
        "blk.0.ffn_norm.weight": named["h.0.ln_2.weight"],
        "blk.1.ffn_up.weight": named["h.1.mlp.c_fc.weight"].T,
        "blk.0.ffn_down.weight": named["h.0.mlp.c_proj.weight"].T,
    }
    for name, parameter in expected.items():
        assert np.array_equal(written[name].data, parameter.detach().numpy()), name
    # every name is one that llama.cpp's GPT-2 knows
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    for name in named:
        stem, kind = f"transformer.{name}".rsplit(".", 1)
        assert f"{known.get_name(stem)}.{kind}" == gguf_name(name)


def test_the_gguf_describes_a_gpt2_without_a_tokenizer(exported: Exported, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_gguf(exported, tmp_path / "f32.gguf"))
    config = checkpoints.gpt2().config
    assert field(reader, "general.architecture") == "gpt2"
    assert field(reader, "gpt2.block_count") == config.n_layer
    assert field(reader, "gpt2.context_length") == config.n_positions
    assert field(reader, "gpt2.embedding_length") == config.n_embd
    assert field(reader, "gpt2.feed_forward_length") == 4 * config.n_embd
    assert field(reader, "gpt2.attention.head_count") == config.n_head
    assert field(reader, "gpt2.attention.layer_norm_epsilon") == pytest.approx(config.layer_norm_epsilon)
    assert field(reader, "gpt2.vocab_size") == config.vocab_size
    assert field(reader, "tokenizer.ggml.model") == "no_vocab"


def test_a_llamas_rotated_rows_are_in_pairs(tmp_path: Path) -> None:
    model = checkpoints.llama()
    folder = checkpoints.save(model, tmp_path / "llama")
    exported = Exported(export(open_checkpoint(str(folder)), tmp_path / "export", 64).folder)
    reader = gguf.GGUFReader(write_gguf(exported, tmp_path / "f32.gguf"))
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    named = dict(model.named_parameters())
    assert len(written) == len(named)
    keys = named["model.layers.1.self_attn.k_proj.weight"].detach().numpy()
    # two heads of 16: row 1 is the first half's partner of row 0, which was 8 rows further
    assert np.array_equal(written["blk.1.attn_k.weight"][:3], keys[[0, 8, 1]])
    assert np.array_equal(written["blk.1.attn_k.weight"][16:19], keys[[16, 24, 17]])
    values = named["model.layers.1.self_attn.v_proj.weight"].detach().numpy()
    assert np.array_equal(written["blk.1.attn_v.weight"], values)
    assert np.array_equal(written["output.weight"], named["lm_head.weight"].detach().numpy())
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "llama.attention.head_count_kv") == 2
    assert field(reader, "llama.rope.freq_base") == model.config.rope_parameters["rope_theta"]
    assert field(reader, "llama.rope.dimension_count") == 16
    # every name is one that llama.cpp's Llama knows
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in named:
        stem, kind = name.rsplit(".", 1)
        assert f"{known.get_name(stem)}.{kind}" == gguf_name(name.removeprefix("model."))


ROPE = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)), "measured on GPT2, Llama, .*; this is a GPTNeoXFor"),
        (LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act="relu")), "its activation is relu"),
        (
            MistralForCausalLM(MistralConfig(**SMALL, sliding_window=63)),
            "slides over 63 tokens, fewer than the 64",
        ),
        (
            LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=ROPE | {"rope_type": "dynamic"})),
            "its rotary scaling is 'dynamic'",
        ),
        (
            LlamaForCausalLM(
                LlamaConfig(**SMALL, rope_parameters=ROPE | {"rope_type": "yarn", "attention_factor": 1.5})
            ),
            "llama.cpp ignores attention_factor of its YaRN",
        ),
        (
            Qwen2ForCausalLM(
                Qwen2Config(
                    **SMALL,
                    rope_parameters=ROPE
                    | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                )
            ),
            "Llama 3's rotary scaling for Llama alone, not for qwen2",
        ),
    ],
    ids=["architecture", "activation", "window", "scaling", "yarn", "llama3"],
)
def test_what_the_peers_would_compute_otherwise_is_refused(model: Any, reason: str, tmp_path: Path) -> None:
    folder = checkpoints.save(model, tmp_path / "model")
    with pytest.raises(BenchError, match=reason):
        export(open_checkpoint(str(folder)), tmp_path / "export", 64)


def test_a_window_that_no_sequence_fills_is_no_difference(tmp_path: Path) -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64))
    folder = checkpoints.save(model, tmp_path / "mistral")
    assert export(open_checkpoint(str(folder)), tmp_path / "export", 64).engines == (
        "llama.cpp",
        "CTranslate2",
    )


def test_peers_are_compared_with_existing_precisions() -> None:
    assert PAIRS.keys() <= loaders.PRECISIONS.keys()
    assert {engine for pairs in PAIRS.values() for engine, _ in pairs} == {"llama.cpp", "CTranslate2"}


def test_a_given_environment_must_have_the_packages(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"no virtual environment with .*llama-cpp-python"):
        environment.ensure(tmp_path)


def test_the_own_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pip that installs nothing and an interpreter that finds every package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = environment.default_folder()
    assert folder == tmp_path / "bitdial" / "peers-venv"
    ran: list[list[str]] = []

    def run(command: list[Any], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        ran.append([str(part) for part in command])
        if "venv" in ran[-1]:
            (folder / "bin").mkdir(parents=True)
            (folder / "bin" / "python").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert environment.ensure() == folder / "bin" / "python"
    made, installed, tried = ran
    assert made[1:] == ["-m", "venv", str(folder)]
    assert installed[-len(environment.REQUIREMENTS) :] == environment.REQUIREMENTS
    assert tried[1] == "-c"
    ran.clear()
    assert environment.ensure() == folder / "bin" / "python"
    assert ran == [tried]


def test_a_failed_installation_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, int("pip" in command))
    )
    with pytest.raises(BenchError, match=r"pip install .* failed"):
        environment.ensure()
