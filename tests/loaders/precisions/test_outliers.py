"""Outlier channels, as large trained models have them: int8 keeps its quality."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.layers.norm_folding import fold_into_weights, fold_norms
from tests import checkpoints

ALL = ("int8", "dynamic-int8", "static-int8", "torchao-int8", "onnx-int8", "onnx-static-int8")
INT8 = [name for name in ALL if loaders.availability(name, "cpu").ok]


def bundled() -> Any:
    """The first two layers of the bundled model, which are trained weights too and take half the time."""
    model = AutoModelForCausalLM.from_pretrained(open_checkpoint("bundled").folder)
    del model.transformer.h[2:]
    model.config.n_layer = 2
    return model


def followers(model: Any) -> list[tuple[Any, Any]]:
    return [
        pair
        for block in model.transformer.h
        for pair in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc))
    ]


@cache
def scored(precision: str, folder: Path) -> Tensor:
    """(tokens, vocabulary) log-probabilities of 300 tokens of English by the model in that folder."""
    tokens = AutoTokenizer.from_pretrained(open_checkpoint("bundled").folder)(topics["assignment"])
    spec = ModelSpec(open_checkpoint(str(folder)), slots=1)
    return loaders.load(precision, spec).runner.score(tokens["input_ids"][:300]).log_softmax(-1)


def divergence(precision: str, folder: Path, reference: Path) -> float:
    """Mean KL divergence from fp32 of the model without outliers, in nats."""
    exact, found = scored("fp32", reference), scored(precision, folder)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(bundled(), tmp_path_factory.mktemp("usual"))


_WEAKER = [pytest.param(factor, marks=pytest.mark.slow) for factor in (20, 50)]


@pytest.fixture(scope="module", params=[*_WEAKER, 100])
def rescaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function: two channels of every norm times a factor, the weights after them divided by it."""
    model, factor = bundled(), request.param
    with torch.no_grad():
        for norm, conv in followers(model):
            channels = norm.weight.abs().topk(2).indices
            norm.weight[channels] *= factor
            norm.bias[channels] *= factor
            conv.weight[channels] /= factor
    return checkpoints.save(model, tmp_path_factory.mktemp(f"outliers-{factor}"))


@pytest.mark.parametrize("precision", INT8)
def test_outliers_at_most_double_the_divergence_of_int8(precision: str, usual: Path, rescaled: Path) -> None:
    assert divergence("fp32", rescaled, usual) < 1e-6
    assert divergence(precision, rescaled, usual) <= 2 * divergence(precision, usual, usual)


def test_folding_a_norm_changes_no_bit_of_the_function() -> None:
    model, ids = bundled().eval(), torch.arange(40)[None]
    with torch.no_grad():
        for norm, conv in followers(model):
            norm.weight[3] *= 60
            norm.bias[3] *= 60
            norm.weight[5] = norm.bias[5] = 0
            conv.weight[7] = 0
        expected = model(ids).logits
        factors = fold_norms(model, head=False)
        assert len(factors) == 4
        for name, factor in factors.items():
            assert factor[3] >= 4
            assert factor[5] == factor[7] == 1
            model.get_submodule(name).weight.mul_(factor[:, None])  # a Conv1D's is (inputs, outputs)
        assert torch.equal(model(ids).logits, expected)


def test_a_llamas_norms_are_folded_into_all_that_read_them() -> None:
    model = checkpoints.llama()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = layer.post_attention_layernorm.weight[3] = 60.0
        model.model.norm.weight[3] = 60.0
        expected = model(ids).logits
        assert fold_into_weights(model, head=True)
        assert float(model.model.layers[0].input_layernorm.weight.max()) < 16
        assert torch.equal(model(ids).logits, expected)


def test_an_unknown_architecture_is_left_as_it_is() -> None:
    model = checkpoints.llama()
    model.config.model_type = "of-another-kind"
    model.model.norm.weight.data[3] = 60.0
    assert fold_norms(model, head=True) == {}
    assert float(model.model.norm.weight[3].detach()) == 60.0
