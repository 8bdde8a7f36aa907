"""LiteRT's precisions, converted and served: the contract of every precision, layers, and the file itself.

Slow: ``python -m pytest -m slow tests/loaders/litert``, some minutes once the converter is installed.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import loaders
from loaders import kernels
from loaders.artifacts.saving import save
from loaders.base import LoadedModel, ModelSpec, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.litert import environment
from tests.conftest import CONVERTER
from tests.loaders import contract
from tests.loaders.contract import RunnerContract, report_of
from tests.loaders.layer_products import weights_in
from tests.loaders.serving import ServingContract

pytestmark = pytest.mark.slow
NAMES = [name for name in loaders.PRECISIONS if name.startswith("litert-")]
contract.TOLERANCE |= {"litert-fp32": 1e-5, "litert-fp16": 2e-3, "litert-int8": 0.1, "litert-full-int8": 0.2}


@pytest.fixture(scope="module", autouse=True)
def converter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's converter, and a cache of this module's own, in which the converted graphs are shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(environment.FOLDER, str(CONVERTER))
        if why := environment.missing():
            pytest.skip(f"{why}: it is installed when the first model is converted")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("litert")))
        yield


@pytest.fixture(scope="module", params=NAMES)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestLiteRT(RunnerContract, ServingContract):
    pass


def test_every_layers_matrix_is_the_checkpoints(model: LoadedModel, small_spec: ModelSpec) -> None:
    report = report_of(model, small_spec)
    lowest = {"litert-fp16": 60.0, "litert-int8": 38.0, "litert-full-int8": 38.0}
    assert len(report.layers) == len(model.footprint.quantized) + len(model.footprint.kept)
    for layer in report.layers:
        assert layer.relative_error is not None
        if model.precision == "litert-fp32":
            assert layer.relative_error == 0
        else:
            assert layer.sqnr_db is not None
            assert layer.sqnr_db > lowest[model.precision], layer.name
    assert bool(model.footprint.quantized) == ("int8" in model.precision)


def test_the_saved_file_is_the_product(small_spec: ModelSpec, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    made_by, method = loaders.maker("litert-int8"), "litert-int8"
    assert made_by is not None
    make = partial(made_by.make, method, small_spec)
    save(small_spec, made_by.recipe(method, small_spec), make, tmp_path / "model.tflite", ignore_progress)
    steps = Interpreter(model_path=str(tmp_path / "model.tflite")).get_signature_list()
    assert {"step_1_1_128", "step_1_32_128", "step_1_1_256", "step_1_32_256"} == set(steps)
    assert os.listdir(tmp_path) == ["model.tflite"]


def saved(method: str, spec: ModelSpec, out: Path) -> ModelSpec:
    made_by = loaders.maker(method)
    assert made_by is not None
    make = partial(made_by.make, method, spec)
    save(spec, made_by.recipe(method, spec), make, out, ignore_progress)
    return ModelSpec(open_checkpoint(str(out)), slots=2)


@pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
@pytest.mark.parametrize("method", ["litert-int8", "litert-full-int8"])
def test_a_trained_checkpoint_keeps_its_codes(method: str, small_spec: ModelSpec, tmp_path: Path) -> None:
    trained = saved("qat-int8", replace(small_spec, granularity="channel"), tmp_path / "trained")
    trained = replace(trained, calibration=small_spec.calibration)
    original = loaders.load("qat-int8", trained)
    model = loaders.load(method, saved(method, trained, tmp_path / "converted"))
    expected, found = (one.runner.score(contract.PROMPT) for one in (original, model))
    assert float((found - expected).norm() / expected.norm()) < contract.TOLERANCE[method]
    names = original.footprint.quantized
    assert model.details["trained_layers"] >= 9
    for name in names:
        expected, found = (weights_in(one, name).dequantize() for one in (original, model))
        assert torch.equal(found, expected), name
