"""Products with weights in affine blocks, by ONNX Runtime's MatMulNBits, and lookups in them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from loaders.layers.affine_blocks import BLOCK, AffineBlocks, pack
from loaders.onnx.lowering import constant, node_of, replace

_DOMAIN = "com.microsoft"
_IN_INT8 = 4  # ONNX Runtime's accuracy level of products whose activations are quantized to int8


def multiply_blocks(graph: Any, layers: Mapping[str, AffineBlocks]) -> None:
    """Puts the blocks in the place of the layers' matrices.

    MatMulNBits quantizes activations to int8 in blocks of the same size, each row by itself.
    """
    import onnx_ir as ir  # optional

    for layer, blocks in layers.items():
        product = node_of(graph, layer)
        x, weight = product.inputs
        parts = {
            "codes": pack(blocks.codes, blocks.bits),
            "scales": blocks.scales,
            "zero_points": pack(blocks.zero_points, blocks.bits),
        }
        stored = [constant(graph, f"{layer}.{role}", part.numpy()) for role, part in parts.items()]
        attributes = {
            "K": blocks.inputs,
            "N": len(blocks.codes),
            "bits": blocks.bits,
            "block_size": BLOCK,
            "accuracy_level": _IN_INT8,
        }
        node = ir.node("MatMulNBits", [x, *stored], attributes=attributes, domain=_DOMAIN, name=layer)
        replace(graph, product, [node])
        del graph.initializers[weight.name]


def look_up_blocks(graph: Any, embedding: str, head: str) -> None:
    """Looks the rows of a tied embedding up in the blocks of the head, which are stored once.

    The blocks of a row must be whole.
    """
    import onnx_ir as ir

    lookup, product = node_of(graph, embedding), node_of(graph, head)
    table, ids = lookup.inputs
    _, codes, scales, zero_points = product.inputs
    flat = constant(graph, f"{head}.flat", np.array([codes.shape[0], -1]))
    parts = [ir.node("Reshape", [value, flat]) for value in (codes, scales, zero_points)]
    data, by_block, middles = (part.outputs[0] for part in parts)
    found = ir.node(
        "GatherBlockQuantized",
        [data, ids, by_block, middles],
        attributes={"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1},
        domain=_DOMAIN,
        name=embedding,
    )
    replace(graph, lookup, [*parts, found])
    del graph.initializers[table.name]
