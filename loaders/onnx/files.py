"""From a loaded model to the graph's file that is served."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from loaders.layers.affine_blocks import BLOCK, AffineBlocks
from loaders.onnx import quantize
from loaders.onnx.blocks import look_up_blocks, multiply_blocks
from loaders.onnx.calibrate import calibrate
from loaders.onnx.export import graph_of
from loaders.onnx.lowering import lower
from loaders.onnx.weights import write_factors

SERVED = "model.onnx"
FLOAT = "float.onnx"
_RAW = "quantized.onnx"
Factors = Mapping[str, Tensor]
"""Those of ``fold_into_weights``, by layer."""


def write_float(model: PreTrainedModel, name: str, path: Path, separate_head: bool) -> None:
    """Exports the model, whose tensors the file then holds in float32.

    Args:
        model: afterwards it computes no more.
        separate_head: a tied head gets a matrix of its own, for the quantizers.
    """
    graph = graph_of(model, name)
    lower(graph, separate_head)
    save(graph, path)


def quantize_int8(folder: Path, head: "Head", keep_head: bool, factors: Factors) -> None:
    """The served int8 graph from the float one, which is removed."""
    raw = folder / _RAW
    quantize.quantize_dynamically(folder / FLOAT, raw, [head.name] if keep_head else [])
    model = read(raw)
    quantize.quantize_by_row(model.graph)
    if head.embedding is not None and not keep_head:
        factor = factors.get(head.name)
        quantize.look_up_codes(model.graph, head.embedding, head.name, factor)
        factors = factors if factor is None else {**factors, head.embedding: factor}
    finish(model, folder, factors)


def quantize_static_int8(folder: Path, head: "Head", samples: Tensor, factors: Factors) -> None:
    """The served graph with constant ranges of activations from the float one, which is removed.

    Layers with outliers in their activations quantize them by the row; the head stays in float32.

    Args:
        samples: (samples, tokens) ids to calibrate on.
    """
    source, half, raw, ranges = (folder / name for name in (FLOAT, "half.onnx", _RAW, "ranges.json"))
    outliers = calibrate(source, ranges, samples.numpy(), [head.name])
    steady = [name for name in products(read(source).graph) if name not in outliers]
    quantize.quantize_dynamically(source, half, steady)
    quantize.quantize_statically(half, raw, ranges, [head.name])
    model = read(raw)
    quantize.quantize_by_row(model.graph)
    quantize.multiply_integers(model.graph)
    finish(model, folder, factors)


def products(graph: Any) -> list[str]:
    """Names of the layers that are products in float32."""
    return [node.name for node in graph if node.op_type == "MatMul"]


def write_int4(folder: Path, head: "Head", layers: Mapping[str, AffineBlocks], factors: Factors) -> None:
    """The served four-bit graph from the float one, which is removed.

    Args:
        layers: the blocks of every linear layer.
    """
    model = read(folder / FLOAT)
    multiply_blocks(model.graph, layers)
    if head.embedding is not None and layers[head.name].inputs % BLOCK == 0:
        look_up_blocks(model.graph, head.embedding, head.name)
    finish(model, folder, factors)


class Head:
    """A model's output head.

    Args:
        name: of its layer.
        embedding: of the layer whose matrix it shares, if it is tied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        names = {module: name for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.name = names[head]
        self.embedding = names[embedding] if head.weight is embedding.weight else None


def read(path: Path) -> Any:
    """A saved graph as an ``onnx_ir.Model``; its weights stay in the file until they are used."""
    import onnx_ir as ir  # optional

    return ir.load(path)


def save(model: Any, path: Path) -> None:
    import onnx_ir as ir  # optional

    ir.save(model, path, external_data=f"{path.name}.data")


def finish(model: Any, folder: Path, factors: Factors) -> None:
    """Saves the served graph; removes the files that it was made from.

    Args:
        factors: included in its weights.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # optional

    RemoveUnusedNodesPass()(model)
    write_factors(model, factors)
    model.opset_imports.setdefault("com.microsoft", 1)
    save(model, folder / SERVED)
    for path in folder.iterdir():
        if path.name not in (SERVED, f"{SERVED}.data"):
            path.unlink()
