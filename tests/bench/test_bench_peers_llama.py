"""The peers compute what ``transformers`` does, on small checkpoints of every family and of odd shapes.

Skipped where the peers' environment is not installed (``bitdial bench --peers`` installs it).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loaders.checkpoint import open_checkpoint
from server.bench.peers import environment
from server.bench.peers.export import Export, export
from server.bench.processes import WorkerProcess
from tests import checkpoints

_INSTALLED = environment.default_folder()  # before the tests' own cache hides it
_ODD = {
    "vocab_size": 331, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "rms_norm_eps": 3e-5,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 2345.0},
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 700.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 900.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0}


def _llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**_ODD, **changes}))


def _gpt2_with_its_own_head() -> Any:
    model: Any = checkpoints.gpt2()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": checkpoints.gpt2,
    "gpt2-own-head": _gpt2_with_its_own_head,
    "llama": _llama,
    "llama-own-head-biases": lambda: _llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: _llama(head_dim=32, num_key_value_heads=6),
    "llama3-scaling": lambda: _llama(rope_parameters=_LLAMA3),
    "llama-linear": lambda: _llama(rope_parameters=_LINEAR),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_ODD, head_dim=32, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ODD)),
    "qwen2-yarn": lambda: Qwen2ForCausalLM(Qwen2Config(**{**_ODD, "rope_parameters": _YARN})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**_ODD, "tie_word_embeddings": False}, head_dim=32)),
}
LONGEST = 128


@pytest.fixture(scope="module")
def peers() -> Iterator[WorkerProcess]:
    python = _INSTALLED / "bin" / "python"
    if not environment.works(python):
        pytest.skip("the peers' environment is not installed: bitdial bench --peers")
    with WorkerProcess("server.bench.peers.worker", python) as process:
        yield process


def made(family: str) -> Any:
    """A model whose norms and biases are random too: as initialized, an omitted one would not show."""
    torch.manual_seed(1)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=float(name.endswith("weight")), std=0.3)
    return model.eval()


def exported(model: Any, folder: Path) -> Export:
    saved = checkpoints.save(model, folder / "checkpoint")
    return export(open_checkpoint(str(saved)), folder / "export", LONGEST)


def logits_of(process: WorkerProcess, folder: Path, ids: list[int], engine: str, kind: str) -> torch.Tensor:
    process.ask(do="load", key="it", engine=engine, kind=kind, export=str(folder / "export"), threads=1)
    process.ask(do="score", key="it", texts=[ids], kept=len(ids), file=str(folder / "logits.npy"))
    process.ask(do="unload", key="it")
    return torch.from_numpy(np.load(folder / "logits.npy"))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peers_compute_the_logits_of_transformers(
    family: str, peers: WorkerProcess, tmp_path: Path
) -> None:
    model = made(family)
    ids = torch.randint(1, model.config.vocab_size, (LONGEST,), generator=torch.manual_seed(2))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    engines = exported(model, tmp_path).engines
    assert "llama.cpp" in engines
    assert ("CTranslate2" in engines) == ("scaling" not in family and family[-4:] not in ("yarn", "near"))
    for engine in engines:
        kind = "f32" if engine == "llama.cpp" else "float32"
        found = logits_of(peers, tmp_path, ids.tolist(), engine, kind)
        # llama.cpp keeps keys and values in float16
        tolerance = 3e-3 if engine == "llama.cpp" else 1e-4
        assert (found - expected).abs().max() <= tolerance * (expected.max() - expected.min()), engine
        losses = [
            torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]) for logits in (found, expected)
        ]
        assert float((losses[0] - losses[1]).exp()) == pytest.approx(1.0, abs=1e-3), engine


def test_llama_cpps_own_quantizations_cost_what_their_bits_say(peers: WorkerProcess, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = _llama(
        hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4
    ).eval()
    ids = torch.randint(1, 331, (LONGEST,), generator=torch.manual_seed(2))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    folder = str(exported(model, tmp_path).folder)
    plain = sum(one.nbytes for one in model.parameters())
    sizes, errors = [], []
    for kind in ("f32", "Q8_0", "Q4_K_M"):
        loaded = peers.ask(do="load", key="it", engine="llama.cpp", kind=kind, export=folder, threads=1)
        sizes.append(loaded["weights_bytes"] / plain)
        peers.ask(do="unload", key="it")
        found = logits_of(peers, tmp_path, ids.tolist(), "llama.cpp", kind)
        errors.append(float((found - expected).norm() / expected.norm()))
    assert sizes[0] == 1.0
    assert 8.5 / 32 <= sizes[1] < 0.28  # blocks of 32 int8 and a float16
    assert 4.5 / 32 <= sizes[2] < 0.22  # some tensors, and the tied head, have 6 bits
    assert errors[0] < errors[1] / 10 < errors[2] / 30
