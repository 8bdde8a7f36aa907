"""From a loaded model to the graph's file that is served."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from loaders.onnx import quantize
from loaders.onnx.export import graph_of
from loaders.onnx.lowering import lower

SERVED = "model.onnx"
FLOAT = "float.onnx"


def write_float(model: PreTrainedModel, name: str, path: Path, separate_head: bool) -> None:
    """Exports the model, whose tensors the file then holds in float32.

    Args:
        model: afterwards it computes no more.
        separate_head: a tied head gets a matrix of its own, for the quantizers.
    """
    graph = graph_of(model, name)
    lower(graph, separate_head)
    save(graph, path)


def quantize_int8(folder: Path, head: "Head", keep_head: bool) -> None:
    """The served int8 graph from the float one, which is removed."""
    raw = folder / "quantized.onnx"
    quantize.quantize_dynamically(folder / FLOAT, raw, [head.name] if keep_head else [])
    model = read(raw)
    quantize.quantize_by_row(model.graph)
    if head.embedding is not None and not keep_head:
        quantize.look_up_codes(model.graph, head.embedding, head.name)
    finish(model, folder)


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


def finish(model: Any, folder: Path) -> None:
    """Saves the served graph; removes the files that it was made from."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # optional

    RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault("com.microsoft", 1)
    save(model, folder / SERVED)
    for path in folder.iterdir():
        if path.name not in (SERVED, f"{SERVED}.data"):
            path.unlink()
