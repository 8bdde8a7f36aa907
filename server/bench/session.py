"""A precision's measurement: all engines are loaded together and run in turn, so that noise affects all."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from loaders.base import LoadedModel
from loaders.runner import GrowingRunner, Runner
from server.bench.bandwidth import Bandwidth, MemorySpeed, middle
from server.bench.contenders import Contender, EngineContender, Prompts
from server.bench.figures import Figures, Floor, Run, mean_context, summarize
from server.bench.peak_memory import Peak, peak_on
from server.host.memory import cache_token_bytes, grown_cache_bytes

_WARM_UP_TOKENS = 8
_PAUSE = 0.3  # seconds until the previous engine's threads sleep: Intel's OpenMP spins for 0.2
MakeContender = Callable[[], Awaitable[Contender]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """The runs, equal for all precisions."""

    batches: tuple[int, ...]
    prompt: int
    tokens: int
    repeat: int
    vocabulary: int
    threads: int


@dataclass(frozen=True)
class OwnMemory:
    """Bytes of a loaded precision besides its weights; the peak is None if unknown."""

    kv_cache_bytes: int
    peak_growth_bytes: int | None


@dataclass(frozen=True)
class Row:
    """One engine at one batch size, in one precision."""

    precision: str
    batch: int
    engine: str
    figures: Figures
    weights_bytes: int | None = None
    ratio: float | None = None
    """bitdial's decode rate ÷ this engine's; None for bitdial itself."""
    ratios: tuple[float, ...] = ()
    """The ratio of each repeat."""
    same_tokens: float | None = None
    """Share of tokens equal to bitdial's, each row counted up to its first difference."""
    memory: OwnMemory | None = None
    floor: Floor | None = None
    bandwidth: Bandwidth | None = None


@dataclass
class Session:
    """Measures one precision and other engines in turn.

    Args:
        load: loads the precision; called by ``measure``, which measures the memory growth.
        others: factories of the other engines, called after that.
    """

    plan: Plan
    load: Callable[[], LoadedModel]
    others: Sequence[MakeContender]
    speed: MemorySpeed
    progress: Progress
    show: Callable[[Row], None]
    device: str = "cpu"
    inspect: Callable[[LoadedModel], None] = lambda _: None
    """Called with the loaded precision after all runs, while it is idle."""
    rows: list[Row] = field(default_factory=list)

    def _cache_bytes(self, runner: Runner, rows: int) -> int:
        if isinstance(runner, GrowingRunner):  # which has given it back by now
            return grown_cache_bytes(runner, rows, self.plan.prompt + self.plan.tokens)
        return runner.kv_cache_bytes

    async def measure(self) -> list[Row]:
        peak = peak_on(self.device)
        loaded = self.load()
        ours = await EngineContender(loaded, self.plan.threads).start()
        contenders: list[Contender] = [ours]
        try:
            peaks = {size: await self._peak(ours, size, peak) for size in self.plan.batches}
            for make in self.others:
                contenders.append(await make())
            for size in self.plan.batches:
                runs, bandwidth = await self._in_turn(contenders, size)
                memory = OwnMemory(self._cache_bytes(loaded.runner, size), peaks[size])
                floor = floor_of(loaded, size, self.plan, bandwidth)
                for contender, row in zip(contenders, self._rows(loaded.precision, size, runs), strict=True):
                    row = replace(row, weights_bytes=contender.weights_bytes)
                    if contender is ours:
                        row = replace(row, memory=memory, floor=floor, bandwidth=bandwidth)
                    self.rows.append(row)
                    self.show(row)
            self.inspect(loaded)
        finally:
            for contender in contenders:
                await contender.close()
        return self.rows

    async def _peak(self, ours: Contender, size: int, peak: Peak) -> int | None:
        await ours.run(self._prompts(size), self.plan.tokens)
        return peak.growth()

    async def _in_turn(
        self, contenders: Sequence[Contender], size: int
    ) -> tuple[dict[str, list[Run]], Bandwidth]:
        prompts = self._prompts(size)
        for contender in contenders:
            await contender.run(prompts, min(_WARM_UP_TOKENS, self.plan.tokens))
        runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
        bandwidths = []
        for done in range(self.plan.repeat):
            self.progress(f"measuring, {size} rows", done, self.plan.repeat)
            for contender in contenders if done % 2 == 0 else reversed(contenders):
                await asyncio.sleep(_PAUSE)
                runs[contender.name].append(await contender.run(prompts, self.plan.tokens))
            bandwidths.append(self.speed.measure())
        return runs, middle(bandwidths)

    def _rows(self, precision: str, size: int, runs: dict[str, list[Run]]) -> Iterator[Row]:
        """One row per contender, in order; the others are compared with the first."""
        ours, *_ = runs.values()
        our_rate = summarize(ours, self.plan.prompt).decode_tokens_per_second
        for name, several in runs.items():
            figures = summarize(several, self.plan.prompt)
            if several is ours:
                yield Row(precision, size, name, figures)
            else:
                ratio = our_rate / figures.decode_tokens_per_second
                ratios = tuple(a.decode_rate / b.decode_rate for a, b in zip(ours, several, strict=True))
                same = same_tokens(ours[0], several[0])
                yield Row(precision, size, name, figures, ratio=ratio, ratios=ratios, same_tokens=same)

    def _prompts(self, rows: int) -> Prompts:
        return prompts_of(rows, self.plan.prompt, self.plan.vocabulary)


def prompts_of(rows: int, length: int, vocabulary: int) -> Prompts:
    """Random token ids, deterministic by the arguments."""
    generator = torch.Generator().manual_seed(7)
    found: Prompts = torch.randint(1, vocabulary, (rows, length), generator=generator).tolist()
    return found


def same_tokens(one: Run, other: Run) -> float | None:
    """Share of ``one``'s tokens equal to ``other``'s, each row counted up to its first difference."""
    if not other.tokens:
        return None
    same = total = 0
    for ours, theirs in zip(one.tokens, other.tokens, strict=True):
        differs = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        same += next(differs, min(len(ours), len(theirs)))
        total += len(ours)
    return same / total


def floor_of(loaded: LoadedModel, rows: int, plan: Plan, bandwidth: Bandwidth) -> Floor:
    """The floor of a step of ``rows`` rows in the middle of a run."""
    weights, kv = floor_bytes(loaded, rows * mean_context(plan.prompt, plan.tokens))
    return Floor(weights, kv, bandwidth.copy, rows)


def floor_bytes(loaded: LoadedModel, cached_tokens: float) -> tuple[int, float]:
    """Bytes that a step must read: its weight matrices, and keys and values of all cached tokens."""
    footprint = loaded.footprint
    per_token = cache_token_bytes(loaded.runner)
    return footprint.weights_bytes - footprint.lookup_bytes, cached_tokens * per_token
