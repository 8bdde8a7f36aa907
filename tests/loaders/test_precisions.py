"""The contract of every precision in the registry, on real small checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

import loaders
from loaders import kernels
from loaders.base import ModelSpec, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.errors import UnknownPrecision
from tests.loaders.contract import RunnerContract, load
from tests.loaders.layer_products import weights_in
from tests.loaders.serving import ServingContract

COMPILED = kernels.get() is not None


@pytest.fixture(scope="module", params=loaders.PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("litert-"):
        pytest.skip("converted by the slow tests in tests/loaders/litert")
    return str(request.param)


class TestEveryPrecision(RunnerContract, ServingContract):
    pass


@pytest.mark.parametrize(
    ("quantizing", "head"),
    [
        ("int8", False),
        ("nf4", COMPILED),
        ("fp4", COMPILED),
        ("dynamic-int8", True),
        ("static-int8", True),
        ("int4", COMPILED),
        ("torchao-int8", False),
        ("torchao-int4", False),
        ("qat-int8", True),
        ("qat-int4", True),
    ],
)
def test_every_linear_layer_of_the_body_is_quantized(
    small_spec: ModelSpec, quantizing: str, head: bool
) -> None:
    loaded = load(quantizing, small_spec)
    kept = {layer.name.rsplit(".", 1)[-1] for layer in loaded.footprint.kept}
    if "GPT2" not in small_spec.checkpoint.architecture:
        assert kept == {"embed_tokens"} | (set() if head else {"lm_head"})
    else:  # its embedding is tied to the head, and looked up there if that is int8 on the kernels
        assert kept == {"wpe"} | (set() if head and COMPILED else {"wte"}) | (set() if head else {"lm_head"})


@pytest.mark.skipif(not COMPILED, reason=str(kernels.find()))
@pytest.mark.parametrize(
    ("dtype", "found"), [("auto", "int8"), ("int8", "int8"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_the_type_of_a_four_bit_models_head(
    small_spec: ModelSpec, dtype: Literal["auto", "int8", "fp16", "fp32"], found: str
) -> None:
    """Its logits depend on nothing else: the head's product of the same states is off by its own rounding."""
    loaded = loaders.load("nf4", replace(small_spec, lm_head_dtype=dtype))
    exact = loaders.load("nf4", replace(small_spec, lm_head_dtype="fp32"))
    assert loaded.details["head"] == f"torch.{found}"
    head = weights_in(loaded, "lm_head")
    assert head.format == found
    assert (found == "float32") == torch.equal(loaded.runner.score([1, 2, 3]), exact.runner.score([1, 2, 3]))
    difference = loaded.runner.score([1, 2, 3]) - exact.runner.score([1, 2, 3])
    assert float(difference.norm() / exact.runner.score([1, 2, 3]).norm()) < 0.02
    assert weights_in(loaded, "lm_head").nbytes < 4 * 320 * 64 or found == "float32"


def test_aliases_and_unknown_names() -> None:
    assert loaders.canonical("8bit") == "int8"
    assert loaders.canonical("4-bit") == "nf4"
    wrongs: list[object] = ["int3", "FP32 ", "", None, [], 8]
    for wrong in wrongs:
        with pytest.raises(UnknownPrecision, match="choose from fp32"):
            loaders.canonical(wrong)


def test_dynamic_int8_is_refused_on_a_gpu_with_the_reason() -> None:
    able = loaders.availability("dynamic-int8", "cuda")
    assert not able.ok
    assert able.reason is not None
    assert "CPU" in able.reason


def test_closing_releases_the_weights(small_spec: ModelSpec) -> None:
    loaded = loaders.load("fp32", small_spec, ignore_progress)
    loaded.close()
    with pytest.raises(RuntimeError, match="closed"):
        loaded.runner.score([1])
    assert loaded.runner.kv_cache_bytes == 0


GPT2_SMALL = {
    "fp32": (497_759_232, {}),
    "bf16": (248_879_616, {}),
    "fp16": (248_879_616, {}),
    "int8": (163_944_960, {"scales": 331_776}),
    "nf4": (121_477_632, {"absmax": 5_308_416}),
    "fp4": (121_477_632, {"absmax": 5_308_416}),
    # on the kernels the embedding is looked up in the int8 head that it is tied to
    "dynamic-int8": (127_163_136 if COMPILED else 281_552_640, {}),
}


WITH_THE_REST_IN_FP32 = {
    "int8": (242_955_264, {"scales": 331_776}),
    "nf4": (200_487_936, {"absmax": 5_308_416}),
    "fp4": (200_487_936, {"absmax": 5_308_416}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loaded", "unquantized", "weights", "state"),
    [
        *((name, "bf16", weights, state) for name, (weights, state) in GPT2_SMALL.items()),
        *((name, "fp32", weights, state) for name, (weights, state) in WITH_THE_REST_IN_FP32.items()),
    ],
)
def test_gpt2_small_to_the_byte(
    loaded: str,
    unquantized: Literal["bf16", "fp32"],
    weights: int,
    state: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """124,439,808 parameters: bytes counted by hand from the shapes."""
    folder = Path(tmp_path_factory.getbasetemp()) / "gpt2-small"
    if not folder.exists():
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    spec = ModelSpec(
        open_checkpoint(str(folder)), slots=1, unquantized_dtype=unquantized, lm_head_dtype=unquantized
    )
    footprint = loaders.load(loaded, spec).footprint
    assert footprint.weights_bytes - footprint.quantization_state_bytes == weights
    assert state.items() <= footprint.quantization_state.items()
