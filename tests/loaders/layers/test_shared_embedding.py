"""Embeddings looked up in the int8 head: one copy, the values of the head's rows, in both forward passes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loaders
from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.layer_errors import layer_errors
from loaders.layers.shared_embedding import SharedEmbedding
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from loaders.runners.transformers_runner import TransformersRunner
from tests import checkpoints, decoders
from tests.loaders.layer_products import module_of, weights_in

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
IDS = [5, 6, 7, 100, 3]


@pytest.mark.parametrize("precision", ["dynamic-int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_embedding_is_looked_up_in_the_head(name: str, precision: str, tmp_path: Path) -> None:
    """GPT-2 adds positions; the last norm is folded into dynamic-int8's head."""
    made = decoders.make(name, **({"intermediate_size": 384} if name == "llama" else {}))
    last = {"llama": "model.norm", "gpt2": "transformer.ln_f"}[name]
    with torch.no_grad():
        made.get_submodule(last).weight[3] = 90
    folder = checkpoints.save(made, tmp_path / "model")
    spec = ModelSpec(open_checkpoint(str(folder)), slots=2)
    model = loaders.load(precision, spec)
    assert isinstance(model.runner, DecoderCPURunner)
    embedding = model.runner.module.get_input_embeddings()
    assert isinstance(embedding, SharedEmbedding)
    assert (embedding.head.input_scale is not None) == (precision == "dynamic-int8")
    exact = made.get_input_embeddings().weight[IDS]
    found = embedding(torch.tensor([IDS]))[0]
    assert float((found - exact).norm() / exact.norm()) < 0.01
    # transformers' own forward pass over the same weights reads the same embeddings
    plain = TransformersRunner(model.runner.module, spec)
    compiled, computed = model.runner.score(IDS), plain.score(IDS)
    assert float((compiled - computed).norm() / computed.norm()) < 0.05


def test_its_bytes_are_counted_once(tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tied")
    spec = ModelSpec(open_checkpoint(str(folder)), slots=1)
    model = loaders.load("dynamic-int8", spec)
    head = weights_in(model, "lm_head")
    apart = loaders.load("dynamic-int8", replace(spec, quantize_lm_head=False))
    embedding = 4 * spec.checkpoint.vocabulary * 64
    saved = apart.footprint.weights_bytes - model.footprint.weights_bytes
    assert saved == embedding - head.nbytes
    assert {"transformer.wte", "lm_head"} <= set(model.footprint.quantized)
    report = layer_errors(model, spec)
    assert report is not None
    shared = {layer.name: layer.shared_with for layer in report.layers}
    assert shared["lm_head"] == "transformer.wte"
    errors = {layer.name: layer.relative_error for layer in report.layers}
    assert errors["transformer.wte"] == errors["lm_head"]
    assert isinstance(module_of(model, "transformer.wte"), SharedEmbedding)


def test_an_untied_embedding_stays(small_spec: ModelSpec) -> None:
    model = loaders.load("dynamic-int8", small_spec)
    tied = "GPT2" in small_spec.checkpoint.architecture
    assert isinstance(model.runner, DecoderCPURunner)
    assert isinstance(model.runner.module.get_input_embeddings(), SharedEmbedding) == tied


@pytest.mark.parametrize("precision", ["dynamic-int8", "nf4"])
def test_an_embedding_that_scales_by_itself_stays_and_is_estimated(precision: str, tmp_path: Path) -> None:
    made = decoders.make("gemma", intermediate_size=384, head_dim=48)
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(made, tmp_path / "gemma"))), slots=1)
    model = loaders.load(precision, spec)
    assert "model.embed_tokens" in {layer.name for layer in model.footprint.kept}
    estimate = loaders.loader(precision).estimate_bytes(precision, spec)
    assert estimate == pytest.approx(model.footprint.weights_bytes, rel=0.05)
