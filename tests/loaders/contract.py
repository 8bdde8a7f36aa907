"""What every precision guarantees, as classes of tests for modules with a fixture ``precision``, its name."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loaders
from loaders.artifacts import prepare
from loaders.base import LoadedModel, ModelSpec, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.errors import CheckpointError, PrecisionUnavailable
from loaders.layer_errors import LayerReport, layer_errors
from loaders.layers.layer_weights import LayerWeights
from tests import checkpoints
from tests.loaders.layer_products import own_bytes, product_with_eye, weights_in

TOKENS = list(range(20, 60))
PROMPT = [40, 41, 42, 60, 61, 62, 63, 90, 91]
# relative error of the logits (Frobenius) that each precision may have against fp32 on these random weights
TOLERANCE = {
    "fp32": 0.0,
    "bf16": 0.03,
    "fp16": 0.004,
    "int8": 0.05,
    "nf4": 0.6,
    "fp4": 0.8,
    "dynamic-int8": 0.1,
    "int4": 0.5,
    "torchao-int8": 0.05,
    "torchao-int4": 0.5,
    "onnx-fp32": 1e-5,
    "onnx-int8": 0.1,
    "onnx-static-int8": 0.3,
    "onnx-int4": 0.5,
    "static-int8": 0.1,
    "qat-int8": 0.1,
    "qat-int4": 0.8,
}
# SQNR in dB on normal weights, lowest and highest: of what a precision quantizes, and of types for the rest
NOISE = {
    "bfloat16": (50, 60),
    "float16": (68, 80),
    "int8": (38, 48),
    "dynamic-int8": (38, 54),  # the more, the fewer weights share a scale
    "onnx-int8": (32, 48),  # 7-bit weights without VNNI
    "onnx-static-int8": (32, 48),
    "onnx-int4": (15, 25),  # calibrated, as int4
    "static-int8": (38, 54),
    "nf4": (19, 23),
    "fp4": (16, 21),
    "int4": (15, 25),  # calibration rounds for the outputs, not for the weights
    "torchao-int8": (38, 48),
    "torchao-int4": (20, 26),
    "qat-int8": (36, 54),  # training moves the weights as well
    "qat-int4": (17, 23),
}


def tolerance(model: LoadedModel) -> float:
    """The precision's own bound, or one that follows from the bits of its codes."""
    if model.precision in TOLERANCE:
        return TOLERANCE[model.precision]
    return 13 * 2.0 ** -min(weights_in(model, name).bits for name in model.footprint.quantized)


def noise(key: str, weights: LayerWeights) -> tuple[float, float]:
    """Lowest and highest SQNR in dB: from the table, or 6 dB a bit, less what the range of a block costs."""
    return NOISE.get(key, (6 * weights.bits - 10, 6 * weights.bits))


def report_of(model: LoadedModel, spec: ModelSpec) -> LayerReport:
    report = layer_errors(model, spec)
    assert report is not None
    return report


def load(precision: str, spec: ModelSpec) -> LoadedModel:
    """The precision loaded, its files made; where this host can't run it, its refusal is checked and the
    test skipped.
    """
    able = loaders.availability(precision, spec.device)
    if not able.ok:
        with pytest.raises(PrecisionUnavailable, match=able.reason):
            loaders.load(precision, spec)
        pytest.skip(f"{precision}: {able.reason}")
    if loaders.is_prepared(precision):  # what takes long is not made by loading
        made = loaders.maker(precision)
        assert made is not None
        prepare(spec, made.recipe(precision, spec), partial(made.make, precision, spec), ignore_progress)
    return loaders.load(precision, spec)


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


class RunnerContract:
    """What is computed: near fp32's, the same alone and in a batch; its bytes; its errors."""

    def test_logits_are_within_the_precisions_tolerance_of_fp32(
        self, model: LoadedModel, reference: LoadedModel
    ) -> None:
        expected, found = reference.runner.score(PROMPT), model.runner.score(PROMPT)
        assert found.shape == (len(PROMPT), model.runner.vocabulary)
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) <= tolerance(model)

    def test_chunked_prefill_and_decode_agree_with_one_pass(self, model: LoadedModel) -> None:
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

    def test_a_row_is_the_same_alone_and_in_a_batch(self, model: LoadedModel) -> None:
        mates = {0: [200, 7], 1: PROMPT, 3: [5] * 30}
        assert greedy(model, mates, 12)[1] == greedy(model, {1: PROMPT}, 12)[0]

    def test_a_concurrent_load_changes_nothing(self, model: LoadedModel) -> None:
        """``transformers`` sets torch's default dtype while it loads, for the whole process."""
        scored, continued = model.runner.score(PROMPT), greedy(model, {1: PROMPT, 3: [5] * 30}, 6)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(model.runner.score(PROMPT), scored)
            assert greedy(model, {1: PROMPT, 3: [5] * 30}, 6) == continued
        finally:
            torch.set_default_dtype(torch.float32)

    def test_a_reused_slot_gives_the_same_tokens(self, model: LoadedModel) -> None:
        first = greedy(model, {2: PROMPT}, 6)
        greedy(model, {2: [9] * 50}, 3)
        assert greedy(model, {2: PROMPT}, 6) == first

    def test_the_footprint_adds_up(
        self, model: LoadedModel, reference: LoadedModel, small_spec: ModelSpec
    ) -> None:
        footprint, full = model.footprint, reference.footprint
        assert sum(footprint.by_dtype.values()) == footprint.weights_bytes
        assert 0 <= full.weights_bytes - 4 * full.parameters <= 512  # rotary tables are no parameters
        assert footprint.parameters == full.parameters
        assert footprint.bits_per_weight == pytest.approx(8 * footprint.weights_bytes / full.parameters)
        kept = {layer.name for layer in footprint.kept}
        assert kept | {*footprint.quantized} == {layer.name for layer in full.kept}
        assert all(layer.reason for layer in footprint.kept)
        estimate = loaders.loader(model.precision).estimate_bytes(model.precision, small_spec)
        assert estimate == pytest.approx(footprint.weights_bytes, rel=0.1)

    def test_a_tensor_of_another_shape_is_named(self, precision: str, tmp_path: Path) -> None:
        folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")
        tensors, text = load_file(folder / "model.safetensors"), checkpoints.calibration_text(tmp_path)
        tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(64, 128)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        spec = ModelSpec(open_checkpoint(str(folder)), calibration=text, training_steps=2)
        with pytest.raises(
            CheckpointError, match=r"does not fit its config.json: .*h\.1\.mlp\.c_fc.* another"
        ):
            load(precision, spec)


class LayerContract:
    """What the error report shows of each layer, against the footprint and the layer's own products."""

    def test_the_error_of_every_matrix_is_in_its_formats_range(
        self, model: LoadedModel, small_spec: ModelSpec
    ) -> None:
        report = report_of(model, small_spec)
        assert {layer.name for layer in report.layers if layer.quantized} == set(model.footprint.quantized)
        assert {layer.name: layer.reason for layer in report.layers if not layer.quantized} == {
            layer.name: layer.reason for layer in model.footprint.kept
        }
        for layer in report.layers:
            assert layer.nbytes >= own_bytes(model, layer.name)
            assert layer.relative_error is not None
            if layer.sqnr_db is None:
                assert (layer.relative_error, layer.max_error) == (0.0, 0.0)
                assert layer.format == "float32"
            else:
                key = model.precision if layer.quantized else layer.format
                if layer.format == "int8" and key in ("nf4", "fp4", "int4", "qat-int4", "onnx-int4"):
                    key = "dynamic-int8"  # the format of the head, and of int4's sensitive layers
                low, high = noise(key, weights_in(model, layer.name))
                assert low <= layer.sqnr_db <= high, layer.name
                assert layer.relative_error == pytest.approx(10 ** (-layer.sqnr_db / 20))
                assert layer.max_error is not None
                assert layer.max_error > 0
        assert report.warning is None

    def test_dequantized_weights_are_those_that_are_multiplied(
        self, model: LoadedModel, small_spec: ModelSpec
    ) -> None:
        """A layer's outputs for the rows of an identity are its weights' columns.

        Also after the first pass, in which bitsandbytes rearranges them.
        """
        before = report_of(model, small_spec)
        model.runner.score(TOKENS)
        after = report_of(model, small_spec)
        for one, other in zip(before.layers, after.layers, strict=True):
            assert other.relative_error == pytest.approx(one.relative_error, rel=0.01)
            if one.kind_before == "Embedding":
                continue
            exact = weights_in(model, one.name).dequantize()
            error = (product_with_eye(model, one.name, one.shape[1]) - exact).norm() / exact.norm()
            assert float(error) < 0.006, one.name  # bf16 products are off by up to 2⁻⁸
