"""The same scales, zero points and codes as PyTorch's and ONNX Runtime's own functions."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization.quant_utils import compute_scale_zp, quantize_nparray
from torch import Tensor
from torch.ao.quantization import observer as ao

from loaders.affine import Per, Scheme, dequantize, grouped, min_max, parameters, quantize

INT8 = Scheme(restricted=False)
ASYMMETRIC = Scheme(symmetric=False)
UINT8 = Scheme(symmetric=False, signed=False)
ONNX_TYPES = {
    INT8: TensorProto.INT8,
    ASYMMETRIC: TensorProto.INT8,
    UINT8: TensorProto.UINT8,
    Scheme(bits=4, restricted=False): TensorProto.INT4,
    Scheme(bits=4, symmetric=False, signed=False): TensorProto.UINT4,
    Scheme(bits=16, symmetric=False, signed=False): TensorProto.UINT16,
}


@pytest.fixture(autouse=True)
def deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces torchao as its successor
        yield


@pytest.fixture
def weight() -> Tensor:
    """Rows of different ranges: normal, skewed, positive, all zero."""
    torch.manual_seed(3)
    weight = torch.randn(40, 192) * torch.logspace(-4, 3, 40)[:, None]
    weight[:10] = weight[:10].exp() - 1.5
    weight[10:12] = weight[10:12].abs()
    weight[12] = 0
    return weight


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Where the rounding of x / S and of x · (1 / S), which PyTorch computes, can't differ."""
    return ((x / scale).frac().abs() - 0.5).abs() > 1e-4


@pytest.mark.parametrize(
    ("scheme", "dtype"), [(INT8, torch.qint8), (ASYMMETRIC, torch.qint8), (UINT8, torch.quint8)]
)
def test_quantize_per_channel_of_pytorch(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    scale, zero_point = parameters(*min_max(weight, "channel"), scheme)
    expected = torch.quantize_per_channel(weight, scale.squeeze(), zero_point.squeeze(), 0, dtype)
    codes = quantize(weight, scale, zero_point, scheme)
    sure = away_from_ties(weight, scale)
    assert sure.float().mean() > 0.99
    assert torch.equal(codes[sure], expected.int_repr().int()[sure])
    assert int((codes - expected.int_repr().int()).abs().max()) <= 1
    assert torch.equal(dequantize(codes, scale, zero_point)[sure], expected.dequantize()[sure])


@pytest.mark.parametrize(
    ("scheme", "dtype"), [(INT8, torch.qint8), (ASYMMETRIC, torch.qint8), (UINT8, torch.quint8)]
)
def test_quantize_per_tensor_of_pytorch(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    scale, zero_point = parameters(*min_max(weight, "tensor"), scheme)
    expected = torch.quantize_per_tensor(weight, float(scale), int(zero_point), dtype)
    codes = quantize(weight, scale, zero_point, scheme)
    sure = away_from_ties(weight, scale)
    assert torch.equal(codes[sure], expected.int_repr().int()[sure])


@pytest.mark.parametrize(
    ("scheme", "dtype", "form"),
    [
        (INT8, torch.qint8, torch.per_channel_symmetric),
        (ASYMMETRIC, torch.qint8, torch.per_channel_affine),
        (UINT8, torch.quint8, torch.per_channel_affine),
        (Scheme(restricted=False, signed=False), torch.quint8, torch.per_channel_symmetric),
    ],
)
def test_parameters_of_pytorchs_observers(weight: Tensor, scheme: Scheme, dtype: Any, form: Any) -> None:
    weight = weight[weight.any(dim=1)]  # PyTorch's scale of zeros is its eps
    observer = ao.PerChannelMinMaxObserver(ch_axis=0, dtype=dtype, qscheme=form)
    observer.eps.fill_(torch.finfo(torch.float32).tiny)
    observer(weight)
    expected, zeros = observer.calculate_qparams()
    scale, zero_point = parameters(*min_max(weight, "channel"), scheme)
    torch.testing.assert_close(scale.squeeze(), expected, rtol=1e-6, atol=0)
    assert torch.equal(zero_point.squeeze(), zeros.int())


@pytest.mark.parametrize("scheme", [*ONNX_TYPES, Scheme()])
def test_parameters_of_onnx_runtime(weight: Tensor, scheme: Scheme) -> None:
    low, high = min_max(weight, "channel")
    scale, zero_point = parameters(low, high, scheme)
    limits = np.array([scheme.lowest, scheme.highest], dtype=np.int32)
    for row in range(len(weight)):
        ends = low[row].numpy()[0], high[row].numpy()[0]
        zero, expected = compute_scale_zp(*ends, *limits, symmetric=scheme.symmetric)
        assert float(scale[row]) == float(expected)
        if row != 12:  # of zeros, where every zero point is right
            assert int(zero_point[row]) == int(zero)


@pytest.mark.parametrize("scheme", [INT8, ASYMMETRIC, UINT8])
def test_codes_of_onnx_runtimes_tools(weight: Tensor, scheme: Scheme) -> None:
    scale, zero_point = parameters(*min_max(weight, "tensor"), scheme)
    expected = quantize_nparray(ONNX_TYPES[scheme], weight.numpy(), scale.numpy(), zero_point.numpy())
    assert torch.equal(quantize(weight, scale, zero_point, scheme), torch.from_numpy(expected).int())


@pytest.mark.parametrize("per", ["tensor", "channel", 32])
@pytest.mark.parametrize("scheme", ONNX_TYPES)
def test_a_session_of_onnx_runtime(weight: Tensor, scheme: Scheme, per: Per) -> None:
    """QuantizeLinear and DequantizeLinear compute the same values, bit for bit."""
    scale, zero_point = (found.squeeze(-1) for found in parameters(*min_max(weight, per), scheme))
    if per == "tensor":
        scale, zero_point = scale.squeeze(), zero_point.squeeze()
    expected = run_session(weight, scale, zero_point, scheme, per)
    x = grouped(weight, per)
    if per != "tensor":
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    found = dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point)
    assert torch.equal(found.reshape(weight.shape), expected)


def run_session(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, per: Per) -> Tensor:
    kind = ONNX_TYPES[scheme]
    axis: dict[str, Any] = {} if per == "tensor" else {"axis": 0}
    if isinstance(per, int):
        axis = {"axis": 1, "block_size": per}
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, scale.shape, scale.reshape(-1).numpy()),
        helper.make_tensor("zero", kind, zero_point.shape, zero_point.reshape(-1).numpy()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **axis),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], **axis),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "round trip", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": weight.numpy()})
    return torch.from_numpy(found)
