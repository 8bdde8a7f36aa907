"""Training a quantized model to give the distributions of the original one (knowledge distillation).

The loss is the KL divergence of the student's next-token distributions from the teacher's (Hinton et al.
2015, arXiv:1503.02531, at temperature 1), on every position of the training text; for quantization-aware
training of language models: LLM-QAT (arXiv:2305.17888).

Interrupted training continues from its last saved state and gives the same weights as if it had run through:
every batch is drawn from (seed, step), and so is the learning rate.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from loaders.base import Progress
from loaders.errors import LoaderError

SAVE_EVERY = 60.0
"""Seconds between saved states."""
_LOGITS = 2**25  # of one pass
_WARMUP, _LOWEST_RATE = 0.1, 0.05  # shares of the steps, and of the learning rate
_BETAS = 0.9, 0.99
_MOST_GRADIENT = 1.0
_log = logging.getLogger(__name__)


class TrainingError(LoaderError):
    """A model can't be trained with these options; the message says why."""


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Args:
        steps: updates of the weights.
        rows: texts of a batch.
        seed: of the choice of texts.
        bfloat16: multiply in bfloat16; weights and gradients stay in float32.
    """

    steps: int
    rows: int
    seed: int
    bfloat16: bool = False


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    trained: Sequence[tuple[Tensor, float]],
    texts: Tensor,
    plan: Plan,
    state: Path,
    progress: Progress,
) -> None:
    """Trains some of the student's parameters.

    Args:
        student, teacher: in evaluation mode: without dropout.
        trained: the parameters, each with its highest learning rate; the others require no gradients.
        texts: (texts, tokens) int64 ids.
        state: a file for the state of the training, which may hold that of an interrupted one. It is removed
            at the end.
        progress: called with ("training: loss …", step, steps).

    Raises:
        TrainingError: the loss is not a number.
    """
    parameters = [parameter for parameter, _ in trained]
    groups = [{"params": [parameter], "highest": rate} for parameter, rate in trained]
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)
    first = _restore(state, parameters, optimizer)
    saved = time.monotonic()
    for step in range(first, plan.steps):
        loss = _gradients(student, teacher, _batch(texts, plan, step), plan)
        if not math.isfinite(loss):
            raise TrainingError(f"the training diverged: its loss is {loss} at step {step + 1}")
        _update(optimizer, parameters, _share(step, plan.steps))
        progress(f"training: loss {loss:.4f}", step + 1, plan.steps)
        if time.monotonic() - saved >= SAVE_EVERY and step + 1 < plan.steps:
            _save(state, parameters, optimizer, step + 1)
            saved = time.monotonic()
    state.unlink(missing_ok=True)


def _batch(texts: Tensor, plan: Plan, step: int) -> Tensor:
    """(rows, tokens) ids, a function of the seed and the step alone."""
    chosen = np.random.default_rng((plan.seed, step)).integers(0, len(texts), plan.rows)
    return texts[torch.from_numpy(chosen)]


def _gradients(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, plan: Plan) -> float:
    """Adds the gradients of a batch; returns its loss, nats a token."""
    total = 0.0
    vocabulary = student.config.get_text_config().vocab_size
    for rows in ids.split(max(1, _LOGITS // (ids.shape[1] * vocabulary))):
        with _arithmetic(plan):
            with torch.no_grad():
                expected = teacher(input_ids=rows, use_cache=False).logits
            found = student(input_ids=rows, use_cache=False).logits
        loss = _divergence(expected, found) / ids.numel()
        loss.backward()
        total += loss.item()
    return total


def _update(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], share: float) -> None:
    """One step of the optimizer at that share of the highest learning rates."""
    torch.nn.utils.clip_grad_norm_(parameters, _MOST_GRADIENT)
    for group in optimizer.param_groups:
        group["lr"] = share * group["highest"]
    optimizer.step()
    optimizer.zero_grad()


def _arithmetic(plan: Plan) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16)


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """The sum of the KL divergences of all tokens."""
    reference, own = (functional.log_softmax(logits.float(), dim=-1) for logits in (expected, found))
    return functional.kl_div(own, reference, reduction="sum", log_target=True)


def _share(step: int, steps: int) -> float:
    """The share of the highest learning rate: rising at first, then falling like a cosine."""
    rising = min(1.0, (step + 1) / max(1, _WARMUP * steps))
    falling = (1 + math.cos(math.pi * step / steps)) / 2
    return rising * (_LOWEST_RATE + (1 - _LOWEST_RATE) * falling)


def _save(path: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    values = [parameter.detach() for parameter in parameters]
    torch.save({"step": step, "parameters": values, "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def _restore(path: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restores a saved state; returns the next step, 0 without one."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        if [one.shape for one in parameters] != [one.shape for one in state["parameters"]]:
            raise ValueError("it is of other parameters")
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # of any class: what a damaged file raises is not specified
        _log.warning("the saved state of a training is not used: %s", error)
        return 0
    with torch.no_grad():
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(value)
    return int(state["step"])
