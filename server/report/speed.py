"""How fast precisions are through their engines: one row and several, and how long single tokens take."""

import asyncio
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from loaders.base import LoadedModel, Progress
from server.bench.contenders import EngineContender, Prompts
from server.bench.figures import MILLISECONDS, Run, percentile, summarize
from server.bench.session import PAUSE, prompts_of

BATCHES = (1, 8)
PROMPT, TOKENS, REPEAT = 32, 48, 3
_WARM_UP = 8


class Pauses:
    """Counts how often the process was stopped and went on: a time that was taken meanwhile is none."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> "Pauses":
        """From now on, where the system has such a signal and this is the main thread."""
        if hasattr(signal, "SIGCONT") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCONT, self._went_on)
        return self

    def _went_on(self, *_: object) -> None:
        self.count += 1


class Speeds:
    """Measures precisions one after the other, each in turn with fp32: a busy minute is unfair to none.

    Made on an event loop, and closed there.

    Args:
        load_reference: loads fp32, when it is first needed.
    """

    def __init__(self, threads: int, pauses: Pauses, load_reference: Callable[[], LoadedModel]) -> None:
        self._threads, self._pauses, self._load_reference = threads, pauses, load_reference
        self._reference: EngineContender | None = None

    async def of_reference(self, model: LoadedModel, progress: Progress) -> dict[str, Any]:
        """fp32's figures, by batch size as text. It stays loaded for the others until this is closed."""
        self._reference = await EngineContender(model, self._threads).start()
        return await self._measure(model, [self._reference], progress)

    async def of(self, model: LoadedModel, progress: Progress) -> dict[str, Any]:
        """Another precision's; it is closed at the end."""
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
        context, total = model.runner.context, len(BATCHES) * REPEAT
        prompt = max(1, min(PROMPT, context // 2))
        tokens = max(2, min(TOKENS, context - prompt))
        found: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "repeat": REPEAT, "batches": {}}
        for number, rows in enumerate(BATCHES):
            prompts = prompts_of(rows, prompt, model.runner.vocabulary)
            for engine in engines:
                await engine.run(prompts, min(_WARM_UP, tokens))
            rounds: list[list[Run]] = []
            while len(rounds) < REPEAT:
                progress("measuring speed", number * REPEAT + len(rounds), total)
                if (runs := await self._round(engines, prompts, tokens)) is not None:
                    rounds.append(runs)
            found["batches"][str(rows)] = _figures(rounds, prompt)
        progress("measuring speed", total, total)
        return found

    async def _round(
        self, engines: Sequence[EngineContender], prompts: Prompts, tokens: int
    ) -> list[Run] | None:
        """A run of each; None if the process was stopped meanwhile."""
        before, runs = self._pauses.count, []
        for engine in engines:
            await asyncio.sleep(PAUSE)
            runs.append(await engine.run(prompts, tokens))
        return runs if self._pauses.count == before else None


def _figures(rounds: Sequence[Sequence[Run]], prompt: int) -> dict[str, Any]:
    """Of the first of each round; ``ratio_to_fp32`` is the median of its rates ÷ the last one's."""
    own = [runs[0] for runs in rounds]
    gaps = sorted(MILLISECONDS * gap for run in own for gap in run.gaps)
    percentiles = [percentile(gaps, share / 100) for share in range(101)] if gaps else []
    return {
        **asdict(summarize(own, prompt)),
        "ratio_to_fp32": median(runs[0].decode_rate / runs[-1].decode_rate for runs in rounds),
        "inter_token_ms": [round(one, 4) for one in percentiles],
    }
