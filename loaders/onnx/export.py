"""A ``transformers`` causal LM → one ONNX graph for prompt chunks and decode steps alike.

Traced by ``transformers.exporters``. Three operations are put into the trace whole: linear layers and
lookups of embeddings as nodes that carry their layer's name, which ``loaders.onnx.lowering`` replaces, and
attention as ONNX Runtime's GroupQueryAttention, which appends keys and values to a cache in place, at each
row's own position.

Inputs: ``input_ids`` and ``position_ids`` (rows, tokens) int64; ``last`` (rows,) int32, the index of each
row's last key after this step; ``total`` () int32, keys of the longest row; ``kept`` (n,) int64, the tokens
whose logits are wanted; ``past.0`` … (rows, heads, context, head dim) float32, a layer's keys, its values,
the next layer's keys … Outputs: ``logits`` (rows, n, vocabulary) and ``present.0`` …, the same memory as the
inputs.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders.errors import CheckpointError, in_short
from loaders.onnx.step import ATTENTION, Step, cache_shape

DOMAIN = "bitdial"
LINEAR, EMBEDDING = "Linear", "Embedding"
OPSET = 21  # the newest that all of ONNX Runtime's quantizers know
TRACED = "model."  # the prefix of the model's tensors in the graph
_ROWS, _TOKENS, _CONTEXT = 2, 3, 16  # sizes of the traced step; none of them is in the graph
_MERGED = 1024  # elements of the largest tensors that the exporter merges with equal ones

_traced: dict[str, bytes] = {}  # by configuration: graphs without weights, which take long to trace


def graph_of(model: PreTrainedModel, name: str) -> Any:
    """The graph as an ``onnx_ir.Model``; its initializers that are the model's tensors share their memory.

    Args:
        model: in float32 and evaluation mode, on the CPU; afterwards it computes no more.
        name: of the checkpoint, for errors.

    Raises:
        CheckpointError: the architecture can't be exported in this form.
    """
    import onnx  # optional
    import onnx_ir as ir

    config = {**model.config.to_dict(), "_name_or_path": None}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    key = f"{type(model).__name__} {tied} {json.dumps(config, sort_keys=True, default=repr)}"
    if key not in _traced:
        _traced[key] = _trace(model, name)
    graph: Any = ir.from_proto(onnx.ModelProto.FromString(_traced[key]))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for value in graph.graph.initializers.values():
        if (own := tensors.get(value.name.removeprefix(TRACED))) is not None:
            value.const_value = ir.tensor(own.detach().contiguous().numpy(), name=value.name)
    return graph


def _trace(model: PreTrainedModel, name: str) -> bytes:
    """The serialized graph; the model's own tensors are empty in it."""
    import onnx_ir as ir

    layers = cache_shape(model.config)[0]
    try:
        with ExitStack() as stack:
            for context in (_quiet(), _whole_layers(model), _distinct(model)):
                stack.enter_context(context)
            traced = _export(model)
    except Exception as error:  # of any class: whatever the trace of an unknown model meets
        raise CheckpointError(f"{name} can't be exported to ONNX ({in_short(error)})") from error
    found = sum(node.op_type == ATTENTION for node in traced.graph)
    if found != layers:
        raise CheckpointError(
            f"{name} can't be exported to ONNX: {found} of its {layers} layers compute attention through "
            "transformers' attention interface"
        )
    own = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
    for value in traced.graph.initializers.values():
        if value.name.removeprefix(TRACED) in own:
            value.const_value = ir.Tensor(_nothing(value), name=value.name)
    return bytes(ir.to_proto(traced).SerializeToString())


def _nothing(value: Any) -> Any:
    import numpy as np

    return np.zeros([0] * len(value.shape), value.dtype.numpy())


def _export(model: PreTrainedModel) -> Any:
    from transformers.exporters import OnnxConfig, OnnxExporter  # these need onnx

    layers, groups, width = cache_shape(model.config)
    rows, tokens, kept, context = (torch.export.Dim(name) for name in ("rows", "tokens", "kept", "context"))
    past = [torch.zeros(_ROWS, groups, _CONTEXT, width) for _ in range(2 * layers)]
    inputs = {
        "input_ids": torch.zeros(_ROWS, _TOKENS, dtype=torch.int64),
        "position_ids": torch.arange(_TOKENS).expand(_ROWS, _TOKENS).contiguous(),
        "last": torch.full((_ROWS,), _TOKENS - 1, dtype=torch.int32),
        "total": torch.tensor(_TOKENS, dtype=torch.int32),
        "kept": torch.arange(1, _TOKENS),
        "past": past,
    }
    shapes = {
        "input_ids": {0: rows, 1: tokens},
        "position_ids": {0: rows, 1: tokens},
        "last": {0: rows},
        "total": None,
        "kept": {0: kept},
        "past": [{0: rows, 2: context}] * len(past),
    }
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET, optimize=False)
    program = OnnxExporter().export(Step(model), inputs, config).program
    _optimize(program, model)
    return program


def _optimize(program: Any, model: PreTrainedModel) -> None:
    """Folds constants, but none of the model's own tensors: the graph serves other weights too."""
    from onnxscript import optimizer  # optional

    own = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
    for value in program.graph.initializers.values():
        if value.name.removeprefix(TRACED) in own:
            value.const_value = None
    optimizer.optimize_ir(program)


@contextmanager
def _whole_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within this context linear layers and embeddings are traced as single nodes with their names."""
    names = {module: name for name, module in model.named_modules()}

    def linear(module: Any, x: Tensor) -> Tensor:
        inputs_first = isinstance(module, Conv1D)
        outputs = module.weight.shape[1 if inputs_first else 0]
        tensors = [x, module.weight, *([] if module.bias is None else [module.bias])]
        attributes = {"layer": names[module], "inputs_first": int(inputs_first)}
        return _node(LINEAR, tensors, attributes, x.dtype, [*x.shape[:-1], outputs])

    def lookup(module: Any, ids: Tensor) -> Tensor:
        weight = module.weight
        shape = [*ids.shape, weight.shape[1]]
        return _node(EMBEDDING, [weight, ids], {"layer": names[module]}, weight.dtype, shape)

    with _replaced((nn.Linear, linear), (Conv1D, linear), (nn.Embedding, lookup)):
        yield


def _node(kind: str, inputs: list[Tensor], attributes: Any, dtype: torch.dtype, shape: Any) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, attributes, dtype=dtype, shape=shape, version=1
    )
    return found


@contextmanager
def _replaced(*forwards: tuple[Any, Any]) -> Iterator[None]:
    """Within this context the classes have other ``forward`` methods; those of subclasses may call them."""
    before = [kind.forward for kind, _ in forwards]
    for kind, forward in forwards:
        kind.forward = forward
    try:
        yield
    finally:
        for (kind, _), forward in zip(forwards, before, strict=True):
            kind.forward = forward


@contextmanager
def _distinct(model: PreTrainedModel) -> Iterator[None]:
    """Within this context no two vectors are equal: equal ones would be merged, for other weights too."""
    vectors = [(one, one.data) for one in model.parameters() if one.numel() <= _MERGED]
    for parameter, data in vectors:
        parameter.data = torch.rand_like(data)
    try:
        yield
    finally:
        for parameter, data in vectors:
            parameter.data = data


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context notes about untested versions, skipped operators and stages are dropped."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
