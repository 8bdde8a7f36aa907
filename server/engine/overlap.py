"""One step ahead: an accelerator computes the next step while the host reads the tokens of the last.

A step starts from the tokens that the one before sampled on the device. The host learns a step late that a
sequence has ended. That costs one row of one step, whose result is dropped; the slot is emptied on the device
after that step.

Everything is launched on one stream, so the device runs it in the order of the launches: a step's inputs are
replaced after the step before has read them, its logits after they were sampled from.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loaders.cuda.pinned import send
from loaders.runner import DeviceRunner, Runner
from server.engine.sampler import PendingTokens, Sampler
from server.engine.sequence import Sequence, Status


class OverlapRunner(Runner, DeviceRunner, Protocol):
    """A runner whose steps can be launched ahead."""


class PendingStep(NamedTuple):
    """A launched step: its rows, none of which needs its history, and their tokens."""

    rows: list[Sequence]
    tokens: PendingTokens


class Overlap:
    """Launches steps of one runner; keeps the step whose tokens the host has not read."""

    def __init__(self, runner: OverlapRunner, sampler: Sampler) -> None:
        self._runner, self._sampler = runner, sampler
        self._pending: PendingStep | None = None

    def take_pending(self) -> PendingStep | None:
        """Hands over the launched step, to be read by the caller; None if all its rows have finished."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        finished = Status.FINISHED
        return None if all(row.status is finished for row in pending.rows) else pending

    def drop_if_idle(self) -> None:
        """Drops a launched step whose rows have all finished, and its tensors with it."""
        self._pending = self.take_pending()

    def continuing_rows(self, rows: list[Sequence], pending: PendingStep | None) -> list[Sequence]:
        """Those of ``rows`` that can be decoded before ``pending`` is read; none if any row needs that first.

        A row that reaches its length with its pending token is left out.
        """
        changed = pending is None or rows != pending.rows  # no pending row needs its history
        if changed and any(row.params.needs_history for row in rows):
            return []
        if pending is None:
            return rows
        if pending.tokens.ids is None:
            return []
        return [
            row
            for row in rows
            if len(row.generated) + 1 < row.params.max_new_tokens or row not in pending.rows
        ]

    def launch(self, rows: list[Sequence], pending: PendingStep | None) -> None:
        """Launches a decode step of these rows, from the pending tokens or, for other rows, the host's."""
        slots = [row.slot for row in rows]
        if pending is None:
            logits = self._runner.decode(slots, [row.generated[-1] for row in rows])
        else:
            logits = self._runner.decode_from(slots, _latest_tokens(rows, pending))
        self._pending = PendingStep(rows, self._sampler.launch(logits, rows))


def _latest_tokens(rows: list[Sequence], pending: PendingStep) -> Tensor:
    """Each row's last token, (rows,): the pending one on the device, or the host's, copied there."""
    assert pending.tokens.ids is not None
    ids = pending.tokens.ids
    if rows == pending.rows:
        return ids
    indices = {row: index for index, row in enumerate(pending.rows)}
    known = [row for row in rows if row not in indices]
    if known:
        indices |= {row: index for index, row in enumerate(known, len(indices))}
        ids = torch.cat((ids, send([row.generated[-1] for row in known], torch.int64, ids)))
    return ids.index_select(0, send([indices[row] for row in rows], torch.int64, ids))
