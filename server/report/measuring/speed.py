"""Speed of precisions through their engines: decoding rates by batch size, and times between tokens."""

import asyncio
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from loaders.base import LoadedModel, Progress
from server.bench.contenders import EngineContender, Prompts
from server.bench.errors import BenchError
from server.bench.figures import MILLISECONDS, Run, percentile, summarize
from server.bench.session import prompts_of
from server.report.certainty import interval_of
from server.report.subject import BATCHES

PROMPT, TOKENS = 32, 48
REPEAT, MOST_REPEAT = 5, 20  # fewer than five give no interval (see ``certainty``)
CLOSE = 1.1
"""Rounds are repeated until the median's interval is within this factor, or a limit is reached."""
SECONDS, MOST_SECONDS, PAUSE = 1.5, 60.0, 0.05
"""Least duration of a batch's runs; duration after which no optional round begins; pause between runs, in
which idle threads go to sleep."""
_WARM_UP = 8


class Pauses:
    """Counts how often the process was suspended and resumed: times measured across that are discarded."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> "Pauses":
        """Starts counting, if the system has SIGCONT and this is the main thread."""
        if hasattr(signal, "SIGCONT") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCONT, self._on_resume)
        return self

    def _on_resume(self, *_: object) -> None:
        self.count += 1


class Speeds:
    """Measures precisions one after the other, each in turn with fp32, so that load on the host affects both.

    Created and closed on one event loop.

    Args:
        load_reference: loads fp32; called when it is first needed.
    """

    def __init__(self, threads: int, pauses: Pauses, load_reference: Callable[[], LoadedModel]) -> None:
        self._threads, self._pauses, self._load_reference = threads, pauses, load_reference
        self._reference: EngineContender | None = None

    async def of_reference(self, model: LoadedModel, progress: Progress) -> dict[str, Any]:
        """fp32's figures. The model stays loaded for the other precisions until ``close``."""
        self._reference = await EngineContender(model, self._threads).start()
        return await self._measure(model, [self._reference], progress)

    async def of(self, model: LoadedModel, progress: Progress) -> dict[str, Any]:
        """Another precision's figures; closes its model."""
        if self._reference is None:
            self._reference = await EngineContender(self._load_reference(), self._threads).start()
        engine = await EngineContender(model, self._threads).start()
        try:
            return await self._measure(model, [engine, self._reference], progress)
        finally:
            await engine.close()

    async def close(self) -> None:
        if self._reference is not None:
            await self._reference.close()

    async def _measure(
        self, model: LoadedModel, engines: Sequence[EngineContender], progress: Progress
    ) -> dict[str, Any]:
        context = model.runner.context
        prompt = max(1, min(PROMPT, context // 2))
        tokens = max(2, min(TOKENS, context - prompt))
        found: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "batches": {}}
        for number, rows in enumerate(BATCHES):
            progress("measuring speed", number, len(BATCHES))
            prompts = prompts_of(rows, prompt, model.runner.vocabulary)
            rounds = await self._rounds(engines, prompts, tokens, context - prompt)
            found["batches"][str(rows)] = _figures(rounds, prompt)
        progress("measuring speed", len(BATCHES), len(BATCHES))
        return found

    async def _rounds(
        self, engines: Sequence[EngineContender], prompts: Prompts, tokens: int, most: int
    ) -> list[list[Run]]:
        """Enough rounds for the interval. Rows generate more than ``tokens`` if they hardly overlap in time.

        Raises:
            BenchError: they don't overlap within the context.
        """
        for engine in engines:
            await engine.run(prompts, min(_WARM_UP, tokens))
        rounds: list[list[Run]] = []
        wasted = 0
        while not _enough(rounds):
            runs = await self._round(engines, prompts, tokens, backwards=len(rounds) % 2 == 1)
            if runs is None:
                continue
            if all(_together(run) for run in runs):
                rounds.append(runs)
            elif tokens < most:
                tokens, rounds = min(2 * tokens, most), []
            elif (wasted := wasted + 1) > MOST_REPEAT:
                raise BenchError(f"{len(prompts)} rows end before all have begun: the context is too short")
        return rounds

    async def _round(
        self, engines: Sequence[EngineContender], prompts: Prompts, tokens: int, backwards: bool
    ) -> list[Run] | None:
        """One run of each engine, in their order; None if the process was suspended meanwhile.

        Args:
            backwards: the last engine runs first; alternating cancels a host's drift.
        """
        before, runs = self._pauses.count, []
        for engine in reversed(engines) if backwards else engines:
            await asyncio.sleep(PAUSE)
            runs.append(await engine.run(prompts, tokens))
        if backwards:
            runs.reverse()
        return runs if self._pauses.count == before else None


def _together(run: Run) -> bool:
    """Whether at least half of the tokens were decoded while all rows ran."""
    begin, end = run.window
    within = sum(begin < time <= end for row in run.arrivals for time in row)
    return 2 * within >= sum(len(row) - 1 for row in run.arrivals)


def _enough(rounds: Sequence[Sequence[Run]]) -> bool:
    """Whether the median's interval is small enough, or a limit of rounds or time is reached."""
    if len(rounds) < REPEAT or len(rounds) >= MOST_REPEAT:
        return len(rounds) >= MOST_REPEAT
    seconds = sum(max(row[-1] for row in run.arrivals) for runs in rounds for run in runs)
    return seconds >= MOST_SECONDS or (seconds >= SECONDS and settled({"batches": {"": _rates(rounds)}}))


def settled(figures: Mapping[str, Any]) -> bool:
    """Whether the intervals of the ratios to fp32 (for fp32: of its rates) are within ``CLOSE``."""
    return all(interval_of(_compared(batch)).factor <= CLOSE for batch in figures["batches"].values())


def _compared(batch: Mapping[str, Any]) -> Sequence[float]:
    return batch["ratios"] if batch["reference_rates"] else batch["decode_rates"]  # type: ignore[no-any-return]


def _rates(rounds: Sequence[Sequence[Run]]) -> dict[str, list[float]]:
    """Rates of every round; ``reference_rates`` are fp32's, and empty when fp32 itself is measured."""
    own = [runs[0].decode_rate for runs in rounds]
    beside = [runs[1].decode_rate for runs in rounds if len(runs) > 1]
    ratios = [one / other for one, other in zip(own, beside or own, strict=True)]
    return {"decode_rates": own, "reference_rates": beside, "ratios": ratios}


def _figures(rounds: Sequence[Sequence[Run]], prompt: int) -> dict[str, Any]:
    """Figures of the first engine of each round; ``ratio_to_fp32`` is the median of its rates ÷ fp32's."""
    own, rates = [runs[0] for runs in rounds], _rates(rounds)
    gaps = sorted(MILLISECONDS * gap for run in own for gap in run.gaps)
    percentiles = [percentile(gaps, share / 100) for share in range(101)] if gaps else []
    return {
        **asdict(summarize(own, prompt)),
        **rates,
        "ratio_to_fp32": median(rates["ratios"]),
        "inter_token_ms": [round(one, 4) for one in percentiles],
    }
