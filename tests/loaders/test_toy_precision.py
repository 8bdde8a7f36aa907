"""A precision added as one file keeps every contract, with no other file changed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.errors import PrecisionUnavailable
from loaders.layer_errors import layer_errors
from tests.loaders.contract import LayerContract, RunnerContract
from tests.loaders.serving import ServingContract


@pytest.fixture(scope="module")
def precision() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loaders.PRECISIONS, "toy-int8", "tests.loaders.toy_int8")
        yield "toy-int8"


class TestToyPrecision(RunnerContract, LayerContract, ServingContract):
    def test_its_layers_are_in_its_own_format(self, model: LoadedModel, small_spec: ModelSpec) -> None:
        report = layer_errors(model, small_spec)
        assert report is not None
        kinds = {(layer.format, layer.kind_after) for layer in report.layers if layer.quantized}
        assert kinds == {("toy-int8", "ToyInt8Linear")}
        assert report.quantized_share > 0.5

    def test_it_is_refused_on_a_gpu(self, precision: str, small_spec: ModelSpec) -> None:
        with pytest.raises(PrecisionUnavailable, match="a toy for CPUs"):
            loaders.load(precision, replace(small_spec, device="cuda"))
