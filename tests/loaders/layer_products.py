"""The weights of a loaded model's single layers, and what these layers multiply."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders.base import LoadedModel
from loaders.footprint import plain_tensors
from loaders.layer_errors import HasModule, layers_of
from loaders.layers.layer_weights import LayerWeights
from loaders.runners.onnx_runner import OnnxRunner


def weights_in(model: LoadedModel, name: str) -> LayerWeights:
    layers = layers_of(model.runner)
    assert layers is not None
    return layers[name][1]


def module_of(model: LoadedModel, name: str) -> Any:
    assert isinstance(model.runner, HasModule)
    return model.runner.module.get_submodule(name)


def own_bytes(model: LoadedModel, name: str) -> int:
    """Of the tensors that PyTorch knows of, the bias left out."""
    if not isinstance(model.runner, HasModule):
        return 0
    module = module_of(model, name)
    tensors = (*module.named_parameters(), *module.named_buffers())
    return sum(part.nbytes for name, one in tensors if name != "bias" for part in plain_tensors(one))


def product_with_eye(model: LoadedModel, name: str, inputs: int) -> Tensor:
    """(outputs, inputs): what a layer gives for the rows of an identity, without its bias."""
    if isinstance(model.runner, OnnxRunner):
        return product_of_eye(model.runner.path, name, inputs).t()
    return multiplied_weights(module_of(model, name), weights_in(model, name))


def multiplied_weights(module: Any, weights: LayerWeights) -> Tensor:
    """(outputs, inputs): the layer's outputs for multiples of the rows of an identity."""
    plain = isinstance(module, nn.Linear | Conv1D) and not weights.quantized
    values = exact_inputs(weights)
    with torch.inference_mode():
        rows = torch.diag(values).to(weights.weight.dtype if plain else torch.float32)
        product: Tensor = module(rows) - (0 if module.bias is None else module.bias)
    found: Tensor = product.t().float() / values
    return found


def exact_inputs(weights: LayerWeights) -> Tensor:
    """(inputs,) values other than 0 that aren't rounded: 1, or the value of a constant scale's last code."""
    if weights.input_factors is None:
        return torch.ones(weights.shape[1])
    factors, zero_points = weights.input_factors
    ends = torch.where(zero_points > 0, -128.0, 127.0) - zero_points
    found: Tensor = ends / factors
    return found


def product_of_eye(path: Path, layer: str, width: int) -> Tensor:
    """(width, outputs) products of the layer's nodes, bias left out, with the rows of an identity: the
    nodes are cut out of the graph's file."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(path)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    (node,) = (node for node in graph.node if node.name == layer)
    x, scale = _input(node, makers, constants)
    y = _output(node, graph.node, constants)
    needed, waiting = list[Any](), [y]
    while waiting:
        name = waiting.pop()
        maker = makers.get(name)
        if name != x and maker is not None and maker not in needed:
            needed.append(maker)
            waiting.extend(maker.input)
    ordered = [one for one in graph.node if one in needed]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(ordered)
    graph.input.append(onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, [None, width]))
    graph.output.append(onnx.helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {x: np.eye(width, dtype=np.float32) * scale})[0]
    return torch.from_numpy(found) / scale


def _input(node: Any, makers: Any, constants: Any) -> tuple[str, float]:
    """What the layer multiplies, and a number that its activations represent exactly."""
    if node.op_type == "MatMul" and node.input[0] in constants:  # W xᵀ
        return makers[makers[node.input[1]].input[0]].input[0], 1.0
    if node.op_type != "MatMulIntegerToFloat":
        return node.input[0], 1.0
    quantized = makers[node.input[0]]
    before = makers.get(quantized.input[0])
    if before is not None and before.op_type == "Div":  # by the row's largest magnitude
        return before.input[0], 1.0
    scale, zero_point = (constants[name] for name in quantized.input[1:3])
    return quantized.input[0], float(scale * (255.0 - zero_point))


def _output(node: Any, nodes: Any, constants: Any) -> str:
    """The layer's product after the factors of its rows, before a bias."""
    found: str = node.output[0]
    largest = {name for one in nodes if one.op_type == "Max" for name in one.output}
    for one in nodes:
        if one.op_type == "Mul" and found in one.input and largest & set(one.input):
            return str(one.output[0])
    if node.op_type == "MatMul" and node.input[0] in constants:
        turned = next(one for one in nodes if found in one.input)
        found = turned.output[0]
    return found
