"""What is particular to models on ONNX Runtime: moved rows, refused architectures, a missing extra."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.errors import PrecisionUnavailable
from loaders.onnx import session
from tests import checkpoints
from tests.loaders.contract import report_of
from tests.loaders.layer_products import weights_in
from tests.loaders.topics import split_topics

SIZES: dict[str, Any] = {
    "vocab_size": checkpoints.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "intermediate_size": 128,
}  # fmt: skip
TEXTS = {0: [40, 41, 42], 1: [7] * 21, 2: [90, 91, 92, 93], 3: [200, 5, 6, 7, 8, 9]}


@pytest.fixture(scope="module")
def precision() -> str:
    return "onnx-int8"


def test_rows_that_change_places_keep_their_texts(model: LoadedModel) -> None:
    """Steps of slots in any order and with gaps give each slot the bits that it gets alone."""
    steps = [[3, 0], [1, 3], [2], [0, 2, 1, 3], [3, 1], [0, 2]]

    def decoded(only: int | None) -> dict[int, list[torch.Tensor]]:
        runner, found = model.runner, {slot: list[torch.Tensor]() for slot in TEXTS}
        for slot, ids in TEXTS.items():
            runner.prefill(slot, ids)
        for step, slots in enumerate(steps):
            chosen = [slot for slot in slots if only in (None, slot)]
            if chosen:
                logits = runner.decode(chosen, [60 + step + slot for slot in chosen]).clone()
                for slot, row in zip(chosen, logits, strict=True):
                    found[slot].append(row)
        for slot in TEXTS:
            runner.free(slot)
        return found

    together = decoded(None)
    for slot in TEXTS:
        for one, other in zip(together[slot], decoded(slot)[slot], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "is in no linear layer"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "depend on the length",
        ),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_before_any_work(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **changes))
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / family))))
    monkeypatch.setattr("loaders.precisions.onnx.load_pretrained", None)
    with pytest.raises(PrecisionUnavailable, match=f"onnx-int8 can't be served here: .*{reason}"):
        loaders.load("onnx-int8", spec)


def test_sums_of_a_models_own_vectors_are_computed_in_the_graph(tmp_path: Path) -> None:
    """Gemma's norms multiply with 1 + w; the traced graph, where w has other values, serves all weights."""
    heads = {"head_dim": 16, "num_key_value_heads": 2}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma", **heads, **SIZES))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.normal_()
        folder = checkpoints.save(model, tmp_path / f"gemma-{seed}")
        spec = ModelSpec(open_checkpoint(str(folder)), artifacts=tmp_path)
        found, exact = (loaders.load(one, spec).runner.score([40, 41, 42]) for one in ("onnx-fp32", "fp32"))
        assert float((found - exact).norm() / exact.norm()) < 1e-4


def test_an_embedding_in_a_folded_head_is_looked_up_as_it_was(tmp_path: Path) -> None:
    """Outliers of the last norm are folded into the tied head, and divided out of the embedding."""
    tied = checkpoints.gpt2()
    with torch.no_grad():
        tied.transformer.ln_f.weight[[3, 9]] = 40.0
        tied.transformer.wte.weight[:, [3, 9]] /= 40.0
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(tied, tmp_path / "tied"))), artifacts=tmp_path)
    found, exact = loaders.load("onnx-int8", spec), loaders.load("fp32", spec)
    factors = weights_in(found, "lm_head").input_scale
    assert factors is not None
    assert factors[3] >= 4
    ids = [40, 41, 42, 60, 61, 62]
    expected = exact.runner.score(ids)
    assert float((found.runner.score(ids) - expected).norm() / expected.norm()) < 0.1
    errors = {one.name: one.sqnr_db or 99.0 for one in report_of(found, spec).layers}
    assert min(errors["lm_head"], errors["transformer.wte"]) > 32


@pytest.mark.slow
def test_four_bits_are_calibrated(tmp_path: Path) -> None:
    """The bundled model is much nearer to fp32 than in blocks that are rounded plainly, as nf4's are."""
    text = tmp_path / "text.txt"
    held_out = split_topics(text)
    spec = ModelSpec(open_checkpoint("bundled"), slots=1, calibration=text, artifacts=tmp_path / "made")
    ids = load_tokenizer(spec.checkpoint)(held_out)["input_ids"][:400]
    exact = loaders.load("fp32", spec).runner.score(ids).log_softmax(-1)
    nf4, found = (loaders.load(name, spec).runner.score(ids).log_softmax(-1) for name in ("nf4", "onnx-int4"))
    errors = [float((exact.exp() * (exact - one)).sum(-1).mean()) for one in (nf4, found)]
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("width", [64, 48])
def test_four_bits_of_any_width(width: int, tmp_path: Path) -> None:
    """A tied embedding is looked up in the head's blocks only if those of a row are whole."""
    sizes = {**SIZES, "hidden_size": width, "num_attention_heads": width // 8, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    folder = checkpoints.save(model, tmp_path / "model")
    text = checkpoints.calibration_text(tmp_path)
    spec = ModelSpec(open_checkpoint(str(folder)), artifacts=tmp_path / "made", calibration=text)
    found, exact = loaders.load("onnx-int4", spec), loaders.load("fp32", spec)
    ids = list(range(20, 60))
    expected = exact.runner.score(ids)
    assert float((found.runner.score(ids) - expected).norm() / expected.norm()) < 0.2
    embedding = weights_in(found, "model.embed_tokens")
    assert embedding.format == ("int8" if width == 64 else "float32")
    bits = {name.rpartition(".")[2]: weights_in(found, name).format for name in found.footprint.quantized}
    assert (bits["q_proj"], bits["v_proj"], bits["down_proj"], bits["lm_head"]) == ("4-bit", *["int8"] * 3)
    assert all(one.sqnr_db is None or one.sqnr_db > 12 for one in report_of(found, spec).layers)


def test_a_missing_extra_is_named_with_its_command(
    small_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    with pytest.raises(PrecisionUnavailable, match=r"onnx is not installed.*pip install 'bitdial\[onnx\]'"):
        loaders.load("onnx-fp32", small_spec)
