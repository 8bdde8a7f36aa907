"""Which Runner computes a loaded ``transformers`` model."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from loaders import kernels
from loaders.architectures import UnsupportedArchitecture, architecture_of
from loaders.base import ModelSpec
from loaders.config_values import other_state, unbatchable
from loaders.cuda.cuda_graphs import CudaGraphs
from loaders.cuda.forward import LeanGPT2
from loaders.cuda.graph_runner import GraphRunner
from loaders.cuda.memory import card_free
from loaders.cuda.static_cache import Unsuitable
from loaders.errors import CheckpointError
from loaders.runner import Runner
from loaders.runners.batching_check import ROUNDING, check_numbers, check_rows, check_sequences
from loaders.runners.decoder_cpu_runner import DecoderCPURunner
from loaders.runners.full_precision import full_precision
from loaders.runners.sequential_runner import FORMS, Form, SequentialRunner
from loaders.runners.transformers_runner import TransformersRunner

_CHECK_SLOTS = 2  # slots that the check of an architecture needs


def runner_for(model: PreTrainedModel, spec: ModelSpec) -> Runner:
    """The compiled or captured runner if it has the architecture and the layers, else ``TransformersRunner``.

    ``SequentialRunner`` computes what can't be batched.

    Raises:
        CheckpointError: no runner computes the model's own logits, or they are not numbers.
        OutOfMemory: the device has no memory for the KV cache.
    """
    if spec.device == "cuda":
        return _on_a_card(model, spec)
    try:
        runner = DecoderCPURunner(model, spec, architecture_of(model.config))
    except UnsupportedArchitecture as error:
        return _uncompiled(model, spec, str(error))
    check_numbers(runner, spec.checkpoint.architecture, model.dtype)
    return runner


def is_compiled(config: Any) -> bool:
    """Whether the compiled forward pass computes models of this configuration on a CPU."""
    if kernels.get() is None:
        return False
    try:
        architecture_of(config)
    except UnsupportedArchitecture:
        return False
    return True


def _on_a_card(model: PreTrainedModel, spec: ModelSpec) -> Runner:
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return _uncompiled(model, spec, f"the model is spread over {len(places)} devices")
    # cuDNN's attention selects its kernel by context length, and a row's result would depend on it
    torch.backends.cuda.enable_cudnn_sdp(False)
    why_not = _why_not_captured(model, spec)
    graphs = None if why_not else CudaGraphs(model.device)
    try:
        if (reason := other_state(spec.checkpoint.config.get_text_config())) is not None:
            raise Unsuitable(reason)
        if not LeanGPT2.serves(model):
            _check_steps(model, spec)
        return GraphRunner(model, spec, graphs, why_not=why_not, free=_free(model, spec))
    except (Unsuitable, CheckpointError) as error:
        return _uncompiled(model, spec, str(error))


def _check_steps(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Checks the architecture on a small temporary cache, uncaptured: the engine's thread captures."""
    name, few = spec.checkpoint.architecture, _few_slots(spec)
    with full_precision(model):
        runner = GraphRunner(model, few, None, why_not="a check", free=_free(model, spec))
        try:
            check_rows(runner, spec.checkpoint.config, name)
        finally:
            runner.close()
    runner = GraphRunner(model, few, None, why_not="a check", free=_free(model, spec))
    try:
        check_numbers(runner, name, runner.module.dtype)
    finally:
        runner.close()


def _uncompiled(model: PreTrainedModel, spec: ModelSpec, why_not: str) -> Runner:
    """``transformers``' forward pass: of a batch if the architecture allows it, else of each sequence.

    Args:
        why_not: the reason why the pass isn't compiled or captured.
    """
    runner: Runner
    try:
        if reason := unbatchable(spec.checkpoint.config.get_text_config()):
            raise CheckpointError(f"{spec.checkpoint.architecture} can't be batched here: {reason}")
        _check_batches(model, spec)
        runner = TransformersRunner(model, spec, why_not)
    except CheckpointError as error:
        runner = SequentialRunner(model, spec, _form(model, spec, str(error)), str(error))
    check_numbers(runner, spec.checkpoint.architecture, model.dtype)
    return runner


def _check_batches(model: PreTrainedModel, spec: ModelSpec) -> None:
    with full_precision(model):
        runner = TransformersRunner(model, _few_slots(spec))
        try:
            check_rows(runner, spec.checkpoint.config, spec.checkpoint.architecture)
        finally:
            runner.close()


def _form(model: PreTrainedModel, spec: ModelSpec, why_not: str) -> Form:
    """The form in which steps compute the logits of one pass: the first that is exact, else the closest.

    A recurrence that forgets soon hides a wrong form, and states in 16 bits blur a right one.
    """
    deviations: dict[Form, float] = {}
    failures: list[CheckpointError] = []
    for form in FORMS:
        try:
            deviations[form] = _check_sequences(model, spec, form, why_not)
        except CheckpointError as error:
            failures.append(error)
        else:
            if deviations[form] < ROUNDING:
                return form
    if not deviations:
        raise failures[0]
    return min(deviations, key=lambda form: deviations[form])


def _check_sequences(model: PreTrainedModel, spec: ModelSpec, form: Form, why_not: str) -> float:
    with full_precision(model):
        runner = SequentialRunner(model, _few_slots(spec), form, why_not)
        try:
            return check_sequences(runner, spec.checkpoint.config, spec.checkpoint.architecture)
        finally:
            runner.close()


def _few_slots(spec: ModelSpec) -> ModelSpec:
    return replace(spec, slots=min(spec.slots, _CHECK_SLOTS))


def _why_not_captured(model: PreTrainedModel, spec: ModelSpec) -> str | None:
    if not spec.cuda_graphs:
        return "CUDA_GRAPHS is off"
    if spec.int8_threshold and getattr(model, "is_loaded_in_8bit", False):
        return (
            "INT8_THRESHOLD is above 0: every layer waits for the host to find outliers, and looks for them "
            "in the whole batch, so that what runs beside a sequence changes its tokens"
        )
    return None


def _free(model: PreTrainedModel, spec: ModelSpec) -> int:
    """Bytes available to the KV cache and the steps."""
    free = card_free(model.device)
    if spec.room is None:
        return free
    weights: int = sum(parameter.nbytes for parameter in model.parameters())
    return min(free, spec.room - weights)
