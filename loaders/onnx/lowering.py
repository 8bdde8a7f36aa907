"""An exported graph's layers as the operations that ONNX Runtime has kernels and quantizers for."""

from typing import Any

from loaders.onnx.export import DOMAIN, EMBEDDING, LINEAR, TRACED


def lower(model: Any, separate_head: bool) -> None:
    """Replaces each linear layer by MatMul and Add, each embedding by Gather; names parameters by layer.

    A layer's product is a node of the layer's name, and its matrix an initializer ``LAYER.weight``:
    (inputs, outputs), as MatMul multiplies it. One that is looked up as well (a tied head's) stays
    (rows, width) and multiplies from the left: what multiplies from the right is rearranged into a copy.

    Args:
        model: an ``onnx_ir.Model`` from ``graph_of``, changed in place.
        separate_head: a tied head gets a matrix of its own nevertheless, for the quantizers.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix(TRACED)
    tied = {node.inputs[0] for node in graph if node.op_type == EMBEDDING}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == LINEAR:
            _lower_linear(graph, node, tied, separate_head)
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == EMBEDDING:
            _lower_embedding(graph, node)
    model.opset_imports.pop(DOMAIN, None)


def replace(graph: Any, node: Any, nodes: list[Any]) -> None:
    """Puts ``nodes`` in the place of a node; the last one's output in that of its output."""
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.shape, new.type, name = old.shape, old.type, old.name
    graph.insert_before(node, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def node_of(graph: Any, layer: str) -> Any:
    return next(node for node in graph if node.name == layer)


def constant(graph: Any, name: str, array: Any) -> Any:
    """A new initializer."""
    import onnx_ir as ir

    tensor: Any = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _lower_embedding(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    layer = node.attributes["layer"].as_string()
    replace(graph, node, [ir.node("Gather", list(node.inputs), name=layer)])


def _lower_linear(graph: Any, node: Any, tied: set[Any], separate_head: bool) -> None:
    import onnx_ir as ir

    x, weight, *bias = node.inputs
    layer = node.attributes["layer"].as_string()
    if weight in tied and not separate_head:
        nodes = _from_the_left(graph, layer, x, weight)
    else:
        stored = weight
        if not node.attributes["inputs_first"].as_int() or weight in tied:
            stored = constant(graph, f"{layer}.turned", weight.const_value.numpy().T.copy())
        nodes = [ir.node("MatMul", [x, stored], name=layer)]
    if bias:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], *bias], name=f"{layer}.add"))
    replace(graph, node, nodes)
    if weight not in tied:
        if stored is not weight:
            del graph.initializers[weight.name]
        stored.name = f"{layer}.weight"


def _from_the_left(graph: Any, layer: str, x: Any, weight: Any) -> list[Any]:
    """x Wᵀ as (W xᵀ)ᵀ, of all rows at once."""
    import numpy as np
    import onnx_ir as ir

    flat = constant(graph, f"{layer}.flat", np.array([-1, weight.shape[1]]))
    rest = constant(graph, f"{layer}.rest", np.array([-1]))
    rows = ir.node("Reshape", [x, flat])
    turned = ir.node("Transpose", [rows.outputs[0]], attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [weight, turned.outputs[0]], name=layer)
    back = ir.node("Transpose", [product.outputs[0]], attributes={"perm": [1, 0]})
    outer = ir.node("Shape", [x], attributes={"start": 0, "end": -1})
    shape = ir.node("Concat", [outer.outputs[0], rest], attributes={"axis": 0})
    whole = ir.node("Reshape", [back.outputs[0], shape.outputs[0]])
    return [rows, turned, product, back, outer, shape, whole]
