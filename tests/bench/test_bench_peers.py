"""The peers' files, read by their own libraries; and their environment."""

import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import loaders
from loaders.checkpoint import open_checkpoint
from server.bench.errors import BenchError
from server.bench.peers import environment
from server.bench.peers.convert import Exported, gguf_name, write_gguf
from server.bench.peers.export import export
from server.bench.peers.worker import PAIRS
from tests import checkpoints


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")
    return Exported(export(open_checkpoint(str(folder)), tmp_path / "export"))


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


def test_the_gguf_describes_the_model_and_its_tokenizer(exported: Exported, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_gguf(exported, tmp_path / "f32.gguf"))
    config = checkpoints.gpt2().config
    assert field(reader, "general.architecture") == "gpt2"
    assert field(reader, "gpt2.block_count") == config.n_layer
    assert field(reader, "gpt2.context_length") == config.n_positions
    assert field(reader, "gpt2.embedding_length") == config.n_embd
    assert field(reader, "gpt2.feed_forward_length") == 4 * config.n_embd
    assert field(reader, "gpt2.attention.head_count") == config.n_head
    assert field(reader, "gpt2.attention.layer_norm_epsilon") == pytest.approx(config.layer_norm_epsilon)
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    tokenizer = checkpoints.byte_tokenizer()
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == len(set(tokens)) == config.vocab_size
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert field(reader, "tokenizer.ggml.merges")[:2] == ["t h", "th e"]
    types = field(reader, "tokenizer.ggml.token_type")
    assert types[0] == gguf.TokenType.CONTROL
    assert types[1] == gguf.TokenType.NORMAL
    assert types[-1] == gguf.TokenType.UNUSED
    assert field(reader, "tokenizer.ggml.eos_token_id") == config.eos_token_id


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.llama(), tmp_path / "llama")
    with pytest.raises(BenchError, match="GPT-2 checkpoints; this is a LlamaForCausalLM"):
        export(open_checkpoint(str(folder)), tmp_path / "export")


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
