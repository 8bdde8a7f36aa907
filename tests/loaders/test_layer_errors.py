"""The per-layer error report against the layers' own products, bitsandbytes' code and hand counts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loaders
from loaders import kernels
from loaders.affine.error import compare
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.layer_errors import LayerError, LayerReport, layer_errors
from loaders.layers.layer_weights import weights_of
from tests import checkpoints
from tests.fakes import fake_model
from tests.loaders.contract import LayerContract, load, report_of

COMPILED = kernels.get() is not None


@pytest.fixture(scope="class", params=["compiled", "torch"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the compiled kernels and on bitsandbytes' and PyTorch's own."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv("BITDIAL_KERNELS", "torch")
            kernels.find.cache_clear()
        elif kernels.get() is None:
            pytest.skip(str(kernels.find()))
        yield request.param
    kernels.find.cache_clear()


@pytest.fixture(scope="class", params=loaders.PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("litert-"):
        pytest.skip("converted by the slow tests in tests/loaders/litert")
    return str(request.param)


@pytest.fixture(scope="class")
def model(precision: str, small_spec: ModelSpec, products: str) -> LoadedModel:
    if products == "torch" and COMPILED and precision.startswith("onnx-"):
        pytest.skip("its products are ONNX Runtime's either way")
    return load(precision, small_spec)


class TestLayersOfEveryPrecision(LayerContract):
    pass


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_dequantized_as_by_bitsandbytes(nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    from loaders.layers.bitsandbytes_layers import layer_class

    torch.manual_seed(1)
    weight = torch.randn(96, 192)
    layer: Any = layer_class("nf4")(192, 96, quant_type="nf4", compress_statistics=nested)
    layer.weight.data = weight
    layer = layer.to("cpu")
    expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state).view(96, 192)
    kept = weights_of(layer)
    assert kept is not None
    torch.testing.assert_close(kept.dequantize(), expected.float(), rtol=1e-6, atol=1e-6)
    layer.eval()(torch.zeros(1, 192, dtype=torch.bfloat16))  # where the CPU has AVX-512 BF16, it packs now
    again = weights_of(layer)
    assert again is not None
    torch.testing.assert_close(again.dequantize(), expected.float(), rtol=2**-7, atol=1e-6)


def test_bytes_are_those_of_the_footprint(small_spec: ModelSpec, products: str) -> None:
    vectors = None
    spec = replace(small_spec, unquantized_dtype="fp32")
    for precision in ("fp32", "int8", "dynamic-int8"):
        model = loaders.load(precision, spec)
        layers = report_of(model, spec).layers
        rest = model.footprint.weights_bytes - sum(x.nbytes for x in layers if x.shared_with is None)
        vectors = rest if vectors is None else vectors
        assert rest == vectors, precision  # biases, norms and rotary tables, the same in all
        assert all(x.bits_per_weight == 8 * x.nbytes / (x.shape[0] * x.shape[1]) for x in layers)


def test_bits_of_a_weight_count_its_scales(products: str) -> None:
    spec = ModelSpec(open_checkpoint("bundled"), slots=1, lm_head_dtype="bf16")
    report = report_of(loaders.load("nf4", spec), spec)
    (layer,) = (x for x in report.layers if x.name == "transformer.h.0.attn.c_attn")
    assert layer.shape == (576, 192)
    assert (layer.kind_before, layer.format) == ("Conv1D", "4-bit")
    assert layer.kind_after == ("NativeLinear" if products == "compiled" else "Linear4bit")
    # four bits, a float32 for 64 weights (bf16 once bitsandbytes has repacked it), a table of sixteen float32
    scale = 2 if products == "torch" and torch.cpu._is_avx512_bf16_supported() else 4
    assert layer.nbytes == 576 * 192 // 2 + 576 * 192 // 64 * scale + 64
    head = report.layers[-1]
    assert (head.name, head.shared_with) == ("lm_head", "transformer.wte")
    assert head.reason is not None
    assert report.quantized_share == pytest.approx(5 * 12 * 192**2 / (5 * 12 * 192**2 + 2048 * 192))


def by_name(report: LayerReport) -> dict[str, LayerError]:
    return {layer.name: layer for layer in report.layers}


def test_older_tensor_names_and_sharded_files(tmp_path: Path) -> None:
    """``openai-community/gpt2`` omits ``transformer.``; large models are sharded."""
    model = checkpoints.gpt2()
    plain, old, shards = (tmp_path / name for name in ("plain", "old", "shards"))
    for folder in (plain, old):
        checkpoints.save(model, folder)
    weights = load_file(old / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, old / "model.safetensors", {"format": "pt"})
    model.save_pretrained(shards, max_shard_size="150KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    specs = [ModelSpec(open_checkpoint(str(folder)), slots=1) for folder in (plain, old, shards)]
    found = [by_name(report_of(loaders.load("int8", spec), spec)) for spec in specs]
    assert found[0] == found[1] == found[2]
    assert all(layer.relative_error is not None for layer in found[1].values())


def test_a_precision_that_quantizes_little_causes_a_warning(tmp_path: Path) -> None:
    """One narrow layer under a large vocabulary: the head is most of the model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=4000, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    folder = checkpoints.save(GPT2LMHeadModel(config), tmp_path)
    spec = ModelSpec(open_checkpoint(str(folder)), slots=1)
    report = report_of(loaders.load("int8", spec), spec)
    assert report.quantized_share == pytest.approx(12 * 64**2 / (12 * 64**2 + 4000 * 64))
    assert report.warning is not None
    assert "int8 has quantized only 16% of this model's linear weights" in report.warning
    for precision in ("fp32", "bf16", "dynamic-int8"):
        assert report_of(loaders.load(precision, spec), spec).warning is None


def test_errors_of_a_matrix() -> None:
    original = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    off = torch.tensor([[3.0, 0.5], [0.0, 4.0]])
    relative, largest, sqnr = compare(original, off)
    assert (relative, largest, sqnr) == pytest.approx((0.1, 0.5, 20.0))
    assert compare(original, original) == (0.0, 0.0, None)
    assert compare(torch.zeros(2, 2), torch.zeros(2, 2)) == (0.0, 0.0, None)


def test_a_runner_without_modules_has_no_report(small_spec: ModelSpec) -> None:
    assert layer_errors(fake_model("int8"), small_spec) is None
