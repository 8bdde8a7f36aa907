"""Exported graphs quantized by ONNX Runtime's own tools.

What the tools leave is brought into the form that is served: activations of ``quantize_dynamic`` are
quantized by the row, since its DynamicQuantizeLinear takes one range over the whole batch, in which a row's
result depends on its batch-mates; both int8 forms multiply by MatMulIntegerToFloat; and a tied embedding is
looked up in the head's codes.

Without VNNI, ONNX Runtime adds pairs of uint8 × int8 products in 16 bits, which saturate. Weights have 7 bits
there (255 × 64 × 2 < 2¹⁵); with 7 bits of activations instead, SmolLM2's mean KL divergence was 0.150, now
0.053.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.onnx.lowering import constant, node_of, replace

_LEVELS = 127  # largest quantized magnitude of an activation
_TINY = np.float32(np.finfo(np.float32).tiny)


def weight_bits() -> int:
    """Of int8 weights on this CPU."""
    return 8 if torch.cpu._is_vnni_supported() else 7


def quantize_dynamically(source: Path, target: Path, kept: Sequence[str]) -> None:
    """int8 weights with a scale per output by ``quantize_dynamic``.

    Args:
        source: the lowered graph's file.
        kept: layers whose products stay in float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # optional

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=weight_bits() == 7,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(kept),
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )


def quantize_by_row(graph: Any) -> None:
    """The products of ``quantize_dynamic``, each row of activations scaled by its own largest magnitude."""
    import onnx_ir as ir

    scale = constant(graph, "activation_scale", np.array(1 / _LEVELS, np.float32))
    middle = constant(graph, "activation_zero_point", np.array(_LEVELS + 1, np.uint8))
    tiny = constant(graph, "activation_least", np.array(_TINY))
    last = constant(graph, "last_axis", np.array([-1]))
    rows: dict[Any, tuple[Any, Any]] = {}
    for product in [node for node in graph if node.op_type == "MatMulInteger"]:
        x = product.inputs[0].producer().inputs[0]
        if x not in rows:
            largest = ir.node(
                "ReduceMax", [_then(graph, product, "Abs", x), last], attributes={"keepdims": 1}
            )
            graph.insert_before(product, largest)
            extent = _then(graph, product, "Max", largest.outputs[0], tiny)
            codes = _then(
                graph, product, "QuantizeLinear", _then(graph, product, "Div", x, extent), scale, middle
            )
            rows[x] = extent, codes
        extent, codes = rows[x]
        weight = product.inputs[1]
        scales = graph.initializers[weight.name.removesuffix("_quantized") + "_scale"]
        (cast,) = (use.node for use in product.outputs[0].uses())
        (scaled,) = (use.node for use in cast.outputs[0].uses())
        layer = product.name.removesuffix("_quant")
        multiplied = _product(layer, codes, weight, scale, scales, middle)
        replace(graph, scaled, [multiplied, ir.node("Mul", [multiplied.outputs[0], extent])])
        graph.remove([cast, product], safe=True)


def quantize_statically(source: Path, target: Path, ranges: Path, kept: Sequence[str]) -> None:
    """int8 weights with a scale per output, uint8 activations with one range each, by ``quantize_static``.

    Args:
        ranges: of the activations, from ``loaders.onnx.calibrate``.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )  # optional

    quantize_static(
        source,
        target,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=weight_bits() == 7,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(kept),
        use_external_data_format=True,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "MatMulConstBOnly": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
        calibration_cache_path=ranges,
    )


def multiply_integers(graph: Any) -> None:
    """The products between QuantizeLinear and DequantizeLinear of ``quantize_static`` in integers."""
    for product in [node for node in graph if node.op_type == "MatMul"]:
        x, weight = (value.producer() for value in product.inputs)
        if not (_is(x, "DequantizeLinear") and _is(weight, "DequantizeLinear")):
            continue
        codes, scale, zero_point = x.inputs
        multiplied = _product(product.name, codes, weight.inputs[0], scale, weight.inputs[1], zero_point)
        replace(graph, product, [multiplied])


def look_up_codes(graph: Any, embedding: str, head: str, factor: Tensor | None) -> None:
    """Looks the rows of a tied embedding up in the head's codes, which then are stored once.

    They are (rows, width) in the file; the head multiplies by their transpose, which ONNX Runtime computes
    when it loads the graph.

    Args:
        factor: (width,) that the head's weights include; it is divided out.
    """
    import onnx_ir as ir

    lookup, product = node_of(graph, embedding), node_of(graph, head)
    table, ids = lookup.inputs
    codes, scales = product.inputs[1], product.inputs[3]
    stored = constant(graph, f"{head}.codes", codes.const_value.numpy().T.copy())
    turned = ir.node("Transpose", [stored], attributes={"perm": [1, 0]})
    graph.insert_before(product, turned)
    product.replace_input_with(1, turned.outputs[0])
    column = constant(graph, f"{head}.rows", np.array([-1, 1]))
    found = ir.node("Gather", [stored, ids], name=embedding)
    floats = ir.node("Cast", [found.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    columns = ir.node("Reshape", [scales, column])
    scale = ir.node("Gather", [columns.outputs[0], ids])
    nodes = [found, floats, columns, scale, ir.node("Mul", [floats.outputs[0], scale.outputs[0]])]
    if factor is not None:
        inverse = constant(graph, f"{head}.inverse", (1 / factor).numpy())
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], inverse]))
    replace(graph, lookup, nodes)
    for unused in (table, codes):
        del graph.initializers[unused.name]


def _product(layer: str, codes: Any, weight: Any, scale: Any, scales: Any, zero_point: Any) -> Any:
    import onnx_ir as ir

    inputs = [codes, weight, scale, scales, zero_point]
    return ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=layer)


def _then(graph: Any, before: Any, kind: str, *inputs: Any) -> Any:
    import onnx_ir as ir

    node = ir.node(kind, inputs)
    graph.insert_before(before, node)
    return node.outputs[0]


def _is(node: Any, kind: str) -> bool:
    return node is not None and node.op_type == kind
