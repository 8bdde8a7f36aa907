"""The contract that every precision of the registry keeps, on real small checkpoints."""

from pathlib import Path
from typing import Literal

import pytest
import torch

import loaders
from loaders.base import LoadedModel, ModelSpec, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.errors import PrecisionUnavailable, UnknownPrecision
from tests import checkpoints

MAKERS = {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}
# relative error of the logits (Frobenius) that each precision may have against fp32 on these random weights
TOLERANCE = {
    "fp32": 0.0,
    "bf16": 0.03,
    "fp16": 0.004,
    "int8": 0.05,
    "nf4": 0.6,
    "fp4": 0.8,
    "dynamic-int8": 0.1,
}
PROMPT = [40, 41, 42, 60, 61, 62, 63, 90, 91]


@pytest.fixture(scope="session", params=MAKERS)
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = checkpoints.save(MAKERS[request.param](), tmp_path_factory.mktemp(request.param))
    return ModelSpec(open_checkpoint(str(folder)), slots=4)


@pytest.fixture(scope="session")
def reference(spec: ModelSpec) -> LoadedModel:
    return loaders.load("fp32", spec)


@pytest.fixture(scope="module", params=loaders.PRECISIONS)
def model(request: pytest.FixtureRequest, spec: ModelSpec) -> LoadedModel:
    able = loaders.availability(request.param, spec.device)
    if not able.ok:
        with pytest.raises(PrecisionUnavailable, match=able.reason):
            loaders.load(request.param, spec)
        pytest.skip(f"{request.param}: {able.reason}")
    return loaders.load(request.param, spec)


def greedy(model: LoadedModel, slots: dict[int, list[int]], count: int) -> list[list[int]]:
    found = []
    for slot, prompt in slots.items():
        logits = model.runner.prefill(slot, prompt)
        assert logits is not None
        found.append([int(logits.argmax())])
    for _ in range(count - 1):
        logits = model.runner.decode(list(slots), [ids[-1] for ids in found])
        for ids, chosen in zip(found, logits.argmax(-1).tolist(), strict=True):
            ids.append(chosen)
    for slot in slots:
        model.runner.free(slot)
    return found


def test_logits_are_as_near_to_fp32_as_the_precision_allows(
    model: LoadedModel, reference: LoadedModel
) -> None:
    expected, found = reference.runner.score(PROMPT), model.runner.score(PROMPT)
    assert found.shape == (len(PROMPT), model.runner.vocabulary)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) <= TOLERANCE[model.precision]


def test_prefill_in_chunks_and_decode_agree_with_one_pass(model: LoadedModel) -> None:
    expected = model.runner.score(PROMPT)
    runner = model.runner
    assert runner.prefill(0, PROMPT[:4], "none") is None
    chunk = runner.prefill(0, PROMPT[4:8], "all")
    assert chunk is not None
    last = runner.decode([0], PROMPT[8:])
    runner.free(0)
    found = torch.cat([chunk, last])
    # the same arithmetic in other shapes: kernels round differently, 16-bit ones visibly
    bound = {"bf16": 0.03, "fp16": 0.005}.get(model.precision, 0.02)
    assert float((found - expected[4:]).norm() / expected[4:].norm()) < bound


def test_a_row_alone_and_among_others(model: LoadedModel) -> None:
    mates = {0: [200, 7], 1: PROMPT, 3: [5] * 30}
    assert greedy(model, mates, 12)[1] == greedy(model, {1: PROMPT}, 12)[0]


def test_a_load_beside_it_changes_nothing(model: LoadedModel) -> None:
    """``transformers`` sets torch's default dtype while it loads, for the whole process."""
    scored, continued = model.runner.score(PROMPT), greedy(model, {1: PROMPT, 3: [5] * 30}, 6)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model.runner.score(PROMPT), scored)
        assert greedy(model, {1: PROMPT, 3: [5] * 30}, 6) == continued
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_slot_used_again_gives_the_same(model: LoadedModel) -> None:
    first = greedy(model, {2: PROMPT}, 6)
    greedy(model, {2: [9] * 50}, 3)
    assert greedy(model, {2: PROMPT}, 6) == first


def test_the_footprint_adds_up(model: LoadedModel, reference: LoadedModel, spec: ModelSpec) -> None:
    footprint, full = model.footprint, reference.footprint
    assert sum(footprint.by_dtype.values()) == footprint.weights_bytes
    assert 0 <= full.weights_bytes - 4 * full.parameters <= 512  # rotary tables are read, but no parameters
    assert footprint.parameters == full.parameters
    assert footprint.bits_per_weight == pytest.approx(8 * footprint.weights_bytes / full.parameters)
    matrices = {*footprint.quantized, *(layer.name for layer in footprint.kept)}
    assert matrices == {layer.name for layer in full.kept}
    assert all(layer.reason for layer in footprint.kept)
    estimate = loaders.loader(model.precision).estimate_bytes(model.precision, spec)
    assert estimate == pytest.approx(footprint.weights_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("precision", "layers"), [("int8", False), ("nf4", False), ("fp4", False), ("dynamic-int8", True)]
)
def test_every_linear_layer_of_the_body_is_quantized(spec: ModelSpec, precision: str, layers: bool) -> None:
    loaded = loaders.load(precision, spec)
    kept = {layer.name.rsplit(".", 1)[-1] for layer in loaded.footprint.kept}
    embeddings = {"wte", "wpe"} if "GPT2" in spec.checkpoint.architecture else {"embed_tokens"}
    assert kept == embeddings | (set() if layers else {"lm_head"})


def test_aliases_and_unknown_names() -> None:
    assert loaders.canonical("8bit") == "int8"
    assert loaders.canonical("4-bit") == "nf4"
    wrongs: list[object] = ["int3", "FP32 ", "", None, [], 8]
    for wrong in wrongs:
        with pytest.raises(UnknownPrecision, match="choose from fp32"):
            loaders.canonical(wrong)


def test_dynamic_int8_is_refused_on_a_card_with_the_reason() -> None:
    able = loaders.availability("dynamic-int8", "cuda")
    assert not able.ok
    assert able.reason is not None
    assert "CPU" in able.reason


def test_closing_lets_go_of_the_weights(spec: ModelSpec) -> None:
    loaded = loaders.load("fp32", spec, ignore_progress)
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
    "dynamic-int8": (281_552_640, {}),
}


WITH_THE_REST_IN_FP32 = {
    "int8": (242_955_264, {"scales": 331_776}),
    "nf4": (200_487_936, {"absmax": 5_308_416}),
    "fp4": (200_487_936, {"absmax": 5_308_416}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "unquantized", "weights", "state"),
    [
        *((name, "bf16", weights, state) for name, (weights, state) in GPT2_SMALL.items()),
        *((name, "fp32", weights, state) for name, (weights, state) in WITH_THE_REST_IN_FP32.items()),
    ],
)
def test_gpt2_small_to_the_byte(
    precision: str,
    unquantized: Literal["bf16", "fp32"],
    weights: int,
    state: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """124,439,808 parameters: what is quantized, what is kept, counted by hand from the shapes."""
    folder = Path(tmp_path_factory.getbasetemp()) / "gpt2-small"
    if not folder.exists():
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    spec = ModelSpec(open_checkpoint(str(folder)), slots=1, unquantized_dtype=unquantized)
    footprint = loaders.load(precision, spec).footprint
    assert footprint.weights_bytes - footprint.quantization_state_bytes == weights
    assert state.items() <= footprint.quantization_state.items()
