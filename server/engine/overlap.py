"""One step ahead of the host: an accelerator computes the next step while the tokens of the last are read.

A step starts from the tokens that the one before picked on the device. What the host learns a step later,
that a sequence has ended, costs a row of a step that is thrown away, and nothing else: its slot is emptied on
the device after that step, and its result is dropped.

Everything is launched on one stream, so it happens on the device in the order in which the host asked for it:
a step's inputs are replaced after the step before has read them, its logits after they were sampled from.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loaders.runner import DeviceRunner, Runner
from server.engine.sampler import PendingTokens, Sampler
from server.engine.sequence import Sequence


class AheadRunner(Runner, DeviceRunner, Protocol):
    """What is needed below."""


@dataclass(frozen=True)
class Launched:
    """A step under way: its rows, which need no history, and the tokens that come of it."""

    rows: list[Sequence]
    picks: PendingTokens


class Overlap:
    """Launches steps of one runner; keeps the one whose tokens the host has not read."""

    def __init__(self, runner: AheadRunner, sampler: Sampler) -> None:
        self._runner, self._sampler = runner, sampler
        self._under_way: Launched | None = None

    def take(self) -> Launched | None:
        """The step under way, which is then the caller's to read; None if all whom it was for have gone."""
        launched, self._under_way = self._under_way, None
        if launched is None or all(row.slot is None for row in launched.rows):
            return None
        return launched

    def drop_if_idle(self) -> None:
        """Forgets a step that nobody waits for: its tensors needn't wait for the next request."""
        self._under_way = self.take()

    def continuing_rows(self, rows: list[Sequence], before: Launched | None) -> list[Sequence]:
        """Those of ``rows`` that can go on unseen; none where any of them must be seen first.

        A row that reaches its length with the token under way ends with it.
        """
        changed = before is None or rows != before.rows  # of which none needs its history
        if changed and any(row.params.needs_history for row in rows):
            return []
        if before is None:
            return rows
        if before.picks.ids is None:
            return []
        return [
            row
            for row in rows
            if len(row.generated) + 1 < row.params.max_new_tokens or row not in before.rows
        ]

    def launch(self, rows: list[Sequence], before: Launched | None) -> None:
        """A decode step of these rows, from the tokens of ``before`` or, where it hasn't any, the host's."""
        slots = [row.slot for row in rows if row.slot is not None]
        if before is None:
            logits = self._runner.decode(slots, [row.generated[-1] for row in rows])
        else:
            logits = self._runner.decode_from(slots, _tokens(rows, before))
        self._under_way = Launched(rows, self._sampler.begin(logits, rows))


def _tokens(rows: list[Sequence], before: Launched) -> Tensor:
    """Each row's last token, (rows,): on the device where it is under way, else sent there."""
    assert before.picks.ids is not None
    ids = before.picks.ids
    if rows == before.rows:
        return ids
    places = {row: place for place, row in enumerate(before.rows)}
    known = [row for row in rows if row not in places]
    if known:
        places |= {row: len(places) + index for index, row in enumerate(known)}
        ids = torch.cat((ids, _send([row.generated[-1] for row in known], ids)))
    return ids.index_select(0, _send([places[row] for row in rows], ids))


def _send(values: list[int], beside: Tensor) -> Tensor:
    made = torch.tensor(values, dtype=torch.int64, pin_memory=beside.is_cuda)
    return made.to(beside.device, non_blocking=True)
