"""Saved checkpoints: served with the same bits, in one precision, and refused where they are damaged."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import loaders
from loaders.artifacts.prepare import NotKept
from loaders.artifacts.saving import save
from loaders.base import ModelSpec, Progress, ignore_progress
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.errors import CheckpointError, PrecisionUnavailable
from loaders.layer_errors import layer_errors
from tests.loaders.contract import PROMPT, TOLERANCE

DIRECT = ("dynamic-int8", "int8", "nf4", "fp4")


def saved(precision: str, spec: ModelSpec, out: Path) -> ModelSpec:
    made_by = loaders.maker(precision)
    assert made_by is not None
    make = partial(made_by.make, precision, spec)
    save(spec, made_by.recipe(precision, spec), make, out, ignore_progress)
    return ModelSpec(open_checkpoint(str(out)), slots=spec.slots)


@pytest.mark.parametrize("precision", DIRECT)
def test_a_saved_checkpoint_is_served(precision: str, small_spec: ModelSpec, tmp_path: Path) -> None:
    found = saved(precision, small_spec, tmp_path / "saved")
    assert found.checkpoint.saved == precision
    assert load_tokenizer(found.checkpoint)("the rain")["input_ids"]
    direct, again = loaders.load(precision, small_spec), loaders.load(precision, found)
    assert again.footprint.quantized == direct.footprint.quantized
    expected, scored = direct.runner.score(PROMPT), again.runner.score(PROMPT)
    if precision == "dynamic-int8":
        assert torch.equal(scored, expected)
        assert again.footprint.weights_bytes == direct.footprint.weights_bytes
    else:  # its norms aren't folded, since transformers reads it as well
        assert float((scored - expected).norm() / expected.norm()) < TOLERANCE[precision]


def test_transformers_reads_a_bitsandbytes_checkpoint(small_spec: ModelSpec, tmp_path: Path) -> None:
    found = saved("nf4", small_spec, tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].float()
    scored = loaders.load("nf4", found).runner.score(PROMPT)
    assert float((scored - expected).norm() / expected.norm()) < 0.02  # bf16 products


def test_a_saved_checkpoint_has_the_options_that_it_was_made_with(
    small_spec: ModelSpec, tmp_path: Path
) -> None:
    found = saved("nf4", replace(small_spec, double_quantization=True), tmp_path / "saved")
    assert not found.double_quantization
    assert loaders.load("nf4", found).details["double_quantization"]


def test_layers_of_a_saved_checkpoint_have_no_originals(small_spec: ModelSpec, tmp_path: Path) -> None:
    found = saved("dynamic-int8", small_spec, tmp_path / "saved")
    report = layer_errors(loaders.load("dynamic-int8", found), found)
    assert report is not None
    assert {layer.relative_error for layer in report.layers} == {None}
    assert all(layer.nbytes > 0 for layer in report.layers)


def test_other_precisions_are_refused(small_spec: ModelSpec, tmp_path: Path) -> None:
    found = saved("nf4", small_spec, tmp_path / "saved")
    for other in ("fp32", "int8"):
        with pytest.raises(PrecisionUnavailable, match="saved is saved in nf4; for other precisions"):
            loaders.load(other, found)


def test_a_damaged_file_is_refused(small_spec: ModelSpec, tmp_path: Path) -> None:
    found = saved("dynamic-int8", small_spec, tmp_path / "saved")
    weights = tmp_path / "saved" / "quantized.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"quantized\.safetensors is damaged"):
        loaders.load("dynamic-int8", found)
    weights.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match=r"quantized\.safetensors is missing or truncated"):
        open_checkpoint(str(tmp_path / "saved"))
    (tmp_path / "saved" / "artifact.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"artifact\.json is missing or can't be read"):
        open_checkpoint(str(tmp_path / "saved"))


def test_a_config_beyond_what_the_files_hold_is_refused(small_spec: ModelSpec, tmp_path: Path) -> None:
    saved("dynamic-int8", small_spec, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    path.write_text(json.dumps({**config, layers: 100_000}))
    with pytest.raises(CheckpointError, match="beyond what is possible"):
        open_checkpoint(str(tmp_path / "saved"))


def test_interrupted_nothing_is_left(small_spec: ModelSpec, tmp_path: Path) -> None:
    def interrupted(folder: Path, progress: Progress) -> None:
        (folder / "quantized.safetensors").write_text("half")
        raise KeyboardInterrupt

    made_by = loaders.maker("dynamic-int8")
    assert made_by is not None
    recipe = made_by.recipe("dynamic-int8", small_spec)
    with pytest.raises(KeyboardInterrupt):
        save(small_spec, recipe, interrupted, tmp_path / "saved", ignore_progress)
    assert [*tmp_path.iterdir()] == []


def test_a_product_is_saved_alone(small_spec: ModelSpec, tmp_path: Path) -> None:
    def graphs(folder: Path, progress: Progress) -> None:
        (folder / "model.onnx").write_text("graph")
        (folder / "layers.json").write_text("{}")

    made_by = loaders.maker("dynamic-int8")
    assert made_by is not None
    recipe = made_by.recipe("dynamic-int8", small_spec)
    save(small_spec, recipe, graphs, tmp_path / "out.onnx", ignore_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_text() == "graph"
    with pytest.raises(NotKept, match="writes 0 files of that kind"):
        save(small_spec, recipe, graphs, tmp_path / "out.tflite", ignore_progress)
