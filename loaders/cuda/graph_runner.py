"""The Runner of a GPU: steps of a few fixed sizes over static tensors, captured and then replayed.

A decode step computes the first 1, 2, 4 … slots, and row i is slot i; padding rows, of slots that don't
decode, write to a dummy slot. A prompt is computed in chunks of a few fixed lengths. All steps are captured
on the first call, on the thread that makes all calls; if that fails they run eagerly over the same tensors,
and ``report`` gives the reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loaders.base import ModelSpec
from loaders.cuda import buckets
from loaders.cuda.cuda_graphs import Graphs, Replay, release_unused
from loaders.cuda.forward import Step, step_for
from loaders.cuda.memory import fitting_slots
from loaders.cuda.static_cache import Shape, ShapeProbe, StaticCache, Unsuitable
from loaders.cuda.static_inputs import DecodeInputs, PromptInputs
from loaders.cuda.step_graphs import Key, StepGraphs
from loaders.errors import OutOfMemory
from loaders.layers.longrope import depends_on_length
from loaders.runner import Logits, Runner


class GraphRunner(Runner):
    """Implements ``DeviceRunner`` and ``ReportingRunner`` as well.

    Args:
        model: in evaluation mode, all of it on one device.
        graphs: captures the steps; None runs every step eagerly.
        why_not: the reason that ``report`` gives when ``graphs`` is None.
        free: bytes on the device; with it, the number of slots is limited to what fits a part of them.

    Raises:
        Unsuitable: the state is not keys and values of one shape, or depends on the length of a text.
        CheckpointError: the state is not keys and values at all.
        OutOfMemory: the device has no memory for one sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        graphs: Graphs | None,
        *,
        why_not: str | None = None,
        free: int | None = None,
    ) -> None:
        self.context, self.vocabulary = spec.max_tokens, spec.checkpoint.vocabulary
        if depends_on_length(model, self.context):
            raise Unsuitable("LongRoPE rotates each row by its own length")
        self._model: PreTrainedModel | None = model
        self._step: Step | None = step_for(model)
        self._device = model.device
        shape = _probe(self._step, self._device)
        columns = buckets.columns_for(self.context)
        self._token_bytes = shape.token_bytes
        slot_bytes = shape.token_bytes * columns
        self.slots = spec.slots if free is None else fitting_slots(spec.slots, slot_bytes, free)
        self._cache: StaticCache | None = StaticCache(shape, self.slots, columns)
        self._lengths = [0] * self.slots
        self._graphs = StepGraphs(
            graphs, why_not, self.slots, self.context, spec.batch_invariant, self._device
        )
        self._decoding = DecodeInputs(self._cache, self._device)
        self._prompt = PromptInputs(self._cache, self._graphs.chunks[-1], self._device)
        self._columns = torch.arange(columns, dtype=torch.int64, device=self._device)
        self._logits = torch.zeros((self.slots, self.vocabulary), dtype=torch.float32, device=self._device)
        self._last = torch.zeros((1, self.vocabulary), dtype=torch.float32, device=self._device)

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], logits: Logits = "last") -> Tensor | None:
        self._graphs.prepare(self._work)
        self._check(self._lengths[slot] + len(ids))
        found = []
        for part, is_last in _parts(ids, self._graphs.chunks[-1]):
            wanted: Logits = "none" if logits == "last" and not is_last else logits
            found.append(self._chunk(slot, part, wanted))
        if logits == "none":
            return None
        return found[-1] if logits == "last" else torch.cat([part for part in found if part is not None])

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self._graphs.prepare(self._work)
        held = [self._lengths[slot] for slot in slots]
        self._decoding.fill(self._live, slots, ids, held)
        return self._decode(slots, 1 + max(held))

    @torch.inference_mode()
    def decode_from(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        self._graphs.prepare(self._work)
        held = [self._lengths[slot] for slot in slots]
        self._decoding.fill_from(self._live, slots, tokens, held)
        return self._decode(slots, 1 + max(held))

    @torch.inference_mode()
    def score_together(self, texts: Sequence[Sequence[int]], kept: int) -> Tensor:
        self._check(len(texts[0]))
        ids = torch.tensor(texts, dtype=torch.int64, device=self._device)
        logits: Tensor = self.module(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        return logits.float()

    @torch.inference_mode()
    def free(self, slot: int) -> None:
        if self._lengths[slot] and self._cache is not None:
            self._cache.clear(slot, self._lengths[slot])
        self._lengths[slot] = 0

    def close(self) -> None:
        self._graphs.close()
        self._model = self._step = self._cache = None
        self._logits = self._last = self._columns = torch.empty(0, dtype=torch.float32)
        if self._device.type == "cuda":
            release_unused()

    @property
    def kv_cache_bytes(self) -> int:
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self._token_bytes

    @property
    def working_bytes(self) -> int:
        """Bytes of logits, column indices, and the graphs' memory."""
        tensors = (self._logits, self._last, self._columns)
        return sum(t.nbytes for t in tensors) + self._graphs.nbytes

    @property
    def module(self) -> PreTrainedModel:
        """The wrapped model."""
        if self._model is None:
            raise RuntimeError("the runner is closed")
        return self._model

    @property
    def captured(self) -> bool:
        """Whether steps are replayed; False before the first call."""
        return bool(self._graphs.replays)

    @property
    def captured_steps(self) -> Mapping[Key, Replay]:
        """The replays, for measurements of single steps."""
        return self._graphs.replays

    def report(self) -> Mapping[str, Any]:
        """For ``/stats``."""
        return {
            "forward": self._step.name if self._step else None,
            "slots": self.slots,
            **self._graphs.report(),
        }

    # steps

    def _decode(self, slots: Sequence[int], longest: int) -> Tensor:
        self._check(longest)
        rows = buckets.smallest(self._graphs.batches, 1 + max(slots))
        self._run(("decode", rows, buckets.smallest(self._graphs.contexts, longest)))
        logits = self._logits[: len(slots)]
        if not self._decoding.in_order:
            logits = self._logits.index_select(0, self._decoding.chosen)
        for slot in slots:  # last, so that retrying a failed step writes to the same positions
            self._lengths[slot] += 1
        return logits

    def _chunk(self, slot: int, ids: Sequence[int], logits: Logits) -> Tensor | None:
        start = self._lengths[slot]
        tokens = buckets.smallest(self._graphs.chunks, len(ids))
        visible = buckets.smallest(self._graphs.contexts, start + len(ids))
        self._prompt.fill(self._live, slot, ids, start, tokens)
        if logits == "all":  # rare, and large
            found = self._compute_prompt(tokens, visible, logits)
            assert found is not None
            kept: Tensor | None = found[0, : len(ids)].float()
        else:
            self._run(("prefill", tokens, visible, logits))
            kept = self._last if logits == "last" else None
        self._lengths[slot] += len(ids)
        return kept

    def _run(self, key: Key) -> None:
        (self._graphs.get(key) or self._work(key))()

    def _work(self, key: Key) -> Replay:
        kind, *arguments = key
        return partial(self._decode_step if kind == "decode" else self._prompt_step, *arguments)

    def _decode_step(self, rows: int, visible: int) -> None:
        inputs = self._decoding
        self._live.begin(inputs.where[:rows], rows, visible)
        logits = self._forward(inputs.ids[:rows, None], inputs.positions[:rows, None], visible, "all")
        assert logits is not None
        self._logits[:rows].copy_(logits[:, 0])

    def _prompt_step(self, tokens: int, visible: int, logits: Logits) -> None:
        found = self._compute_prompt(tokens, visible, logits)
        if found is not None:
            self._last.copy_(found[0])

    def _compute_prompt(self, tokens: int, visible: int, logits: Logits) -> Tensor | None:
        inputs = self._prompt
        self._live.begin(inputs.where[:tokens], inputs.slot, visible)
        keep = inputs.last if logits == "last" else logits
        return self._forward(inputs.ids[None, :tokens], inputs.positions[None, :tokens], visible, keep)

    def _forward(self, ids: Tensor, positions: Tensor, visible: int, keep: Any) -> Tensor | None:
        if self._step is None:
            raise RuntimeError("the runner is closed")
        return self._step(ids, positions, self._columns[:visible], self._live, keep)

    @property
    def _live(self) -> StaticCache:
        if self._cache is None:
            raise RuntimeError("the runner is closed")
        return self._cache

    def _check(self, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(f"{tokens} tokens do not fit a slot of {self.context}")


@torch.inference_mode()
def _probe(step: Step, device: torch.device) -> Shape:
    """The keys and values of one token, from a forward pass over a single token."""
    probe, zero = ShapeProbe(), torch.zeros((1, 1), dtype=torch.int64, device=device)
    try:
        step(zero, zero, zero[0], probe, "none")
    except torch.OutOfMemoryError as error:  # a RuntimeError that says nothing about the architecture
        raise OutOfMemory("no room on the device for a forward pass") from error
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise Unsuitable(f"its forward pass takes no static cache ({type(error).__name__})") from error
    return probe.shape()


def _parts(ids: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], bool]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size], start + size >= len(ids)
