"""A saved checkpoint as a model in float32: the same weights, the same function."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import loaders
from loaders import kernels
from loaders.artifacts.dequantized import dequantized
from loaders.artifacts.saving import save
from loaders.base import ModelSpec, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.errors import CheckpointError
from tests import checkpoints, decoders

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
IDS = torch.arange(30, 70)


def trained(model: PreTrainedModel, folder: Path, **options: Any) -> ModelSpec:
    """A checkpoint that is saved in qat-int8."""
    original = checkpoints.save(model, folder / "m")
    text = checkpoints.calibration_text(folder)
    spec = ModelSpec(
        open_checkpoint(str(original)), slots=2, calibration=text, artifacts=folder / "a", training_steps=1
    )
    spec, made_by = replace(spec, **options), loaders.maker("qat-int8")
    assert made_by is not None
    make = partial(made_by.make, "qat-int8", spec)
    save(spec, made_by.recipe("qat-int8", spec), make, folder / "saved", ignore_progress)
    return ModelSpec(open_checkpoint(str(folder / "saved")), slots=2)


def with_outliers() -> PreTrainedModel:
    """A tied Llama whose last norm has an outlier: its head is folded, its embedding isn't."""
    model: Any = decoders.make("llama", vocab_size=320)
    model.model.norm.weight.data[5] *= 64
    return model


@pytest.mark.parametrize("granularity", ["group", "channel"])
@pytest.mark.parametrize("make", [checkpoints.gpt2, checkpoints.llama, with_outliers])
def test_it_computes_what_the_saved_one_does(make: Any, granularity: str, tmp_path: Path) -> None:
    spec = trained(make(), tmp_path, granularity=granularity)
    found = dequantized(spec, ignore_progress)
    served = loaders.load("qat-int8", spec)
    expected = served.runner.score(IDS.tolist())
    with torch.no_grad():
        logits = found.model(IDS[None]).logits[0]
    assert float((logits - expected).norm() / expected.norm()) < 0.06  # activations aren't rounded
    linears = set(served.footprint.quantized) - {"transformer.wte", "model.embed_tokens"}
    assert found.codes.keys() == found.scales.keys() == (linears if granularity == "channel" else set())
    for name, codes in found.codes.items():
        weight: Any = found.model.get_submodule(name).weight
        matrix = weight.t() if type(found.model.get_submodule(name)).__name__ == "Conv1D" else weight
        assert torch.equal(codes * found.scales[name][:, None], matrix), name


@pytest.mark.parametrize(("granularity", "tied"), [("group", False), ("channel", True)])
def test_a_folded_head_has_weights_of_its_own(granularity: str, tied: bool, tmp_path: Path) -> None:
    model: Any = dequantized(
        trained(with_outliers(), tmp_path, granularity=granularity), ignore_progress
    ).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == tied


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    spec = trained(checkpoints.gpt2(), tmp_path)
    weights = tmp_path / "saved" / "quantized.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"quantized\.safetensors is damaged"):
        dequantized(spec, ignore_progress)


def test_without_the_kernels_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = trained(checkpoints.gpt2(), tmp_path)
    monkeypatch.setattr("loaders.artifacts.dequantized.kernels.get", lambda: None)
    with pytest.raises(CheckpointError, match="can't be read without the compiled kernels"):
        dequantized(spec, ignore_progress)
