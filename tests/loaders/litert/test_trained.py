"""Trained codes in a quantized graph: exactly those, with their biases, and in no other matrix."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loaders.litert.trained import CODES, SCALES, keep_trained

NAMES = {"w": ["layer"], "t": ["layer"], "e": ["embedding", "head"]}
CODES_OF_LAYER = np.array(
    [[5, -126, 3], [100, 7, -90]], np.int8
)  # their largest are not 127: other scales fit
SCALES_OF_LAYER = np.array([0.5, 0.25], np.float32)
BIAS = np.array([3.0, -2.0])
INPUT_SCALE = 0.01


def bytes_of(values: Any) -> Any:
    return np.frombuffer(values.tobytes(), np.uint8)


def quantization(scales: Any) -> Any:
    return SimpleNamespace(scale=np.asarray(scales, np.float32), zeroPoint=np.zeros(len(scales), np.int64))


def tensor(name: str, kind: int, values: Any, buffer: int, scales: Any) -> Any:
    return SimpleNamespace(
        name=name.encode(),
        type=kind,
        shape=np.array(values.shape),
        buffer=buffer,
        quantization=quantization(scales),
    )


def rounded(matrix: Any) -> tuple[Any, Any]:
    scales = np.abs(matrix).max(axis=1) / 127
    return np.rint(matrix / scales[:, None]).astype(np.int8), scales.astype(np.float32)


@pytest.fixture
def graph() -> Any:
    """Two steps that share the buffers of a quantized layer, as a quantizer rounds it."""
    codes, scales = rounded(CODES_OF_LAYER * SCALES_OF_LAYER[:, None])
    bias = np.rint(BIAS / (scales * INPUT_SCALE)).astype(np.int32)
    buffers = [SimpleNamespace(data=bytes_of(values)) for values in (codes, bias)]
    steps = []
    for _ in range(2):
        tensors = [tensor("w", 9, codes, 0, scales), tensor("b", 2, bias, 1, scales * INPUT_SCALE)]
        operators = [SimpleNamespace(inputs=np.array([7, 0, 1])), SimpleNamespace(inputs=None)]
        steps.append(SimpleNamespace(tensors=tensors, operators=operators))
    return SimpleNamespace(subgraphs=steps, buffers=buffers)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({f"layer{CODES}": CODES_OF_LAYER, f"layer{SCALES}": SCALES_OF_LAYER}, tmp_path / "trained")
    return tmp_path / "trained"


def test_codes_scales_and_biases_are_the_trained_ones_in_every_step(graph: Any, file: Path) -> None:
    before = graph.buffers[0].data.view(np.int8).reshape(2, 3).copy()
    assert not np.array_equal(before, CODES_OF_LAYER)
    assert keep_trained(graph, NAMES, file) == ["layer"]
    assert np.array_equal(graph.buffers[0].data.view(np.int8).reshape(2, 3), CODES_OF_LAYER)
    for step in graph.subgraphs:
        weight, bias = step.tensors
        assert np.array_equal(weight.quantization.scale, SCALES_OF_LAYER)
        np.testing.assert_allclose(bias.quantization.scale, SCALES_OF_LAYER * INPUT_SCALE, rtol=1e-6)
        held = graph.buffers[1].data.view(np.int32) * bias.quantization.scale
        np.testing.assert_allclose(held, BIAS, atol=float(bias.quantization.scale.max()))


def test_another_matrix_is_left_as_it_is(graph: Any, file: Path) -> None:
    """A name may stand for the transposed matrix of a square layer."""
    codes, scales = rounded(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    graph.buffers.append(SimpleNamespace(data=bytes_of(codes)))
    graph.subgraphs[0].tensors.append(tensor("t", 9, codes, 2, scales))
    keep_trained(graph, NAMES, file)
    assert np.array_equal(graph.buffers[2].data.view(np.int8).reshape(2, 3), codes)
    assert np.array_equal(graph.subgraphs[0].tensors[2].quantization.scale, scales)


def test_without_trained_codes_nothing_is_kept(graph: Any, tmp_path: Path) -> None:
    save_file({f"other{CODES}": CODES_OF_LAYER, f"other{SCALES}": SCALES_OF_LAYER}, tmp_path / "trained")
    before = graph.buffers[0].data.copy()
    assert keep_trained(graph, NAMES, tmp_path / "trained") == []
    assert np.array_equal(graph.buffers[0].data, before)
