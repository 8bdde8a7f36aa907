"""A model from its name, and one text continued by it; the server's engine does this for many at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.base import LoadedModel, ModelSpec, Progress, default_device
from loaders.checkpoint import open_checkpoint
from loaders.end_tokens import with_end_token
from loaders.runner import LengthRunner, Runner

_CHUNK = 128  # prompt tokens of one call, as in the server


def spec_of(model: str | Path, progress: Progress) -> ModelSpec:
    """The options of a model that is given by its name alone: one sequence, on a GPU if there is one."""
    return ModelSpec(open_checkpoint(str(model), progress=progress), device=default_device(), slots=1)


def generate(model: LoadedModel, text: str, max_new_tokens: int) -> str:
    """As ``LoadedModel.generate``."""
    if max_new_tokens < 1:
        raise ValueError("max_new_tokens must be at least 1")
    tokenizer, runner = model.tokenizer, model.runner
    prompt: list[int] = tokenizer(text)["input_ids"]
    if not prompt:
        raise ValueError("the prompt has no tokens")
    if len(prompt) + max_new_tokens > runner.context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; with {max_new_tokens} new ones they don't fit "
            f"into the context of {runner.context}"
        )
    assert model.spec is not None  # the tokenizer came from it
    ends = with_end_token(model.spec.checkpoint, tokenizer).eos_ids
    ids = _continue(runner, prompt, max_new_tokens, ends)
    return _added(tokenizer, prompt, ids)


def _continue(runner: Runner, prompt: Sequence[int], most: int, ends: frozenset[int]) -> list[int]:
    """The most probable token, step by step, without the end token."""
    found: list[int] = []
    try:
        token = _prefill(runner, prompt)
        while token not in ends:
            found.append(token)
            if len(found) == most:
                break
            token = int(runner.decode([0], [token])[0].argmax())
    finally:
        runner.free(0)
    return found


def _prefill(runner: Runner, prompt: Sequence[int]) -> int:
    """The most probable token after the prompt, which is computed in chunks."""
    if isinstance(runner, LengthRunner):
        runner.expect(0, len(prompt))
    last = (len(prompt) - 1) // _CHUNK * _CHUNK
    for start in range(0, last, _CHUNK):
        runner.prefill(0, prompt[start : start + _CHUNK], "none")
    logits = runner.prefill(0, prompt[last:], "last")
    assert logits is not None
    return int(logits[-1].argmax())


def _added(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ``ids`` add to the prompt's. Alone they may decode otherwise: without a leading blank."""
    before, whole = (_decoded(tokenizer, some) for some in (prompt, [*prompt, *ids]))
    return whole.removeprefix(before) if whole.startswith(before) else _decoded(tokenizer, ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
