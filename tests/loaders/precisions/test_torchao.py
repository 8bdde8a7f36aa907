"""torchao's tensors in a model: their codes, their bytes, and the choice of what runs well on a host."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.errors import PrecisionUnavailable
from loaders.precisions import torchao
from tests import checkpoints
from tests.loaders.contract import report_of

installed = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@installed
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (48, 96), (208, 160), (16, 32)])
def test_four_bit_codes_are_found_in_the_order_that_the_cpu_packs_them(outputs: int, inputs: int) -> None:
    """The packed order has whole tiles of outputs and a remainder; each row of an identity is a column."""
    from loaders.layers.torchao_layers import TorchAOLinear

    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    exact = layer.weight.detach().clone()
    quantized = TorchAOLinear(layer, "int4-weight-only", torch.bfloat16)
    weights = quantized.layer_weights()
    found = weights.dequantize()
    product = nn.functional.linear(torch.eye(inputs, dtype=torch.bfloat16), quantized.weight).t()
    torch.testing.assert_close(product.float(), found, rtol=2**-8, atol=1e-6)
    assert 0.02 < float((found - exact).norm() / exact.norm()) < 0.09
    assert weights.nbytes == outputs * inputs // 2 + outputs * inputs // 32 * 4


@installed
def test_a_cpu_without_bfloat16_quantizes_rows_of_activations(
    small_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    model = loaders.load("torchao-int8", small_spec)
    assert model.details["scheme"] == "int8-dynamic"
    assert model.details["compute_dtype"] == "torch.float32"
    reference = loaders.load("fp32", small_spec).runner.score([5, 6, 7, 8])
    assert float((model.runner.score([5, 6, 7, 8]) - reference).norm() / reference.norm()) < 0.05
    assert all(layer.format == "int8" for layer in report_of(model, small_spec).layers if layer.quantized)
    outlier, ids = [300, 1, 2, 3, 4, 5], [40, 41, 42, 60]
    alone = model.runner.score_together([ids], 4)[0]
    assert torch.allclose(model.runner.score_together([ids, outlier[:4]], 4)[0], alone, rtol=1e-4, atol=1e-4)


@installed
def test_widths_that_int4_cannot_take(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=48, n_layer=1, n_head=2)
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(GPT2LMHeadModel(config), tmp_path))))
    with pytest.raises(PrecisionUnavailable, match=r"c_attn has 48 inputs and 144 outputs, no multiples"):
        loaders.load("torchao-int4", spec)
    assert loaders.load("torchao-int8", spec).footprint.quantized_share > 0.5


@pytest.mark.parametrize("precision", ["torchao-int8", "torchao-int4"])
def test_without_the_library_the_install_command_is_named(
    precision: str, small_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchao, "find_spec", lambda _: None)
    with pytest.raises(
        PrecisionUnavailable, match=r"torchao is not installed .*pip install 'bitdial\[torchao\]'"
    ):
        loaders.load(precision, small_spec)


@installed
def test_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of int4 has a kernel for tensor cores only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loaders.availability("torchao-int8", "cuda").reason == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert loaders.availability("torchao-int8", "cuda").ok
    assert "compute capability 8.0" in str(loaders.availability("torchao-int4", "cuda").reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert loaders.availability("torchao-int4", "cuda").ok
