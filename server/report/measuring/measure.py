"""Measures every precision in steps: loading and memory, speed, quality.

Speeds come first, each precision in turn with fp32; then each is compared with fp32 on the text.
At most fp32 and one other precision are loaded at the same time.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import loaders
from loaders import quality
from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.checkpoint import open_checkpoint
from loaders.errors import LoaderError
from loaders.layer_errors import layer_errors
from loaders.model_id import BUNDLED
from loaders.texts import Text, TextError
from server.bench.document import plain
from server.bench.errors import BenchError
from server.errors import ServiceError
from server.host.memory import full_cache_bytes
from server.host.threads import resolve, run_in_own_thread
from server.report.measuring.speed import Pauses, Speeds, settled
from server.report.store import SavedReport
from server.report.subject import REFERENCE

LOADING, SPEED, QUALITY = "loading", "speed", "quality"
Load = Callable[[str, ModelSpec, Progress], LoadedModel]


@dataclass(frozen=True)
class StepProgress:
    """Progress of a measurement: the running step, counted from 1, and the progress within its stage."""

    precision: str
    step: int
    steps: int
    stage: str
    current: int
    total: int


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        precisions: fp32 is added if it isn't among them: the others are compared with it.
        text: None: no quality is measured.
        window, stride, prompts: as in ``loaders.quality.measure``.
    """

    spec: ModelSpec
    precisions: tuple[str, ...]
    text: Text | None
    tokenizer: Any = None
    window: int | None = None
    stride: int | None = None
    prompts: int = 16

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((REFERENCE, *self.precisions)))


def _done(step: str, figures: Mapping[str, Any] | None) -> bool:
    """Whether a step needs no measuring. Speeds that scatter too much are measured again."""
    return figures is not None and (step != SPEED or settled(figures))


class Measurement:
    """Measures the steps that ``saved`` lacks, and speeds in it that scatter too much.

    Args:
        on_progress: called often, with the current step.
        load: same signature as ``loaders.load``.
    """

    def __init__(
        self,
        plan: Plan,
        saved: SavedReport,
        on_progress: Callable[[StepProgress], None] = lambda progress: None,
        pauses: Pauses | None = None,
        load: Load = loaders.load,
    ) -> None:
        self._plan, self._saved, self._on_progress, self._load = plan, saved, on_progress, load
        self._pauses = pauses or Pauses()
        self._threads = resolve(plan.spec.threads)
        steps = [(name, step) for step in (LOADING, SPEED) for name in plan.names]
        if plan.text is not None:
            steps += [(name, QUALITY) for name in plan.names]
        self._missing = [(name, step) for name, step in steps if not _done(step, saved.get(name, step))]
        self._all, self._done = len(steps), len(steps) - len(self._missing)

    def run(self) -> None:
        """Measures all steps.

        Raises:
            LoaderError, ServiceError, BenchError: fp32 fails; another's failure is recorded in the report.
            TextError: the text can't be evaluated.
        """
        asyncio.run(self._measure_speeds())
        wanting = [name for name, step in self._missing if step == QUALITY]
        if wanting:
            reference = self._loaded(REFERENCE)
            try:
                for name in wanting:
                    with self._record_failure(name):
                        self._measure_quality(reference, name)
            finally:
                reference.close()
        self._saved.finish()

    @contextmanager
    def _record_failure(self, name: str) -> Iterator[None]:
        """Records an error of the body in the report; fp32's errors pass through."""
        try:
            yield
        except (LoaderError, ServiceError, TextError, BenchError) as error:
            if name == REFERENCE:
                raise
            self._saved.fail(name, str(error))

    async def _measure_speeds(self) -> None:
        speeds = Speeds(self._threads, self._pauses, lambda: self._loaded(REFERENCE))
        try:
            for name in self._plan.names:
                if (name, LOADING) in self._missing or (name, SPEED) in self._missing:
                    with self._record_failure(name):
                        await self._load_and_run(name, speeds)
        finally:
            await speeds.close()

    async def _load_and_run(self, name: str, speeds: Speeds) -> None:
        if (name, LOADING) in self._missing:
            self._warm_up(name)
        model, progress = self._loaded(name), self._progress(name)
        if (name, LOADING) in self._missing:
            self._keep(name, LOADING, run_in_own_thread(lambda: self._loading(model), self._threads))
        if (name, SPEED) not in self._missing:
            model.close()
        else:
            measure = speeds.of_reference if name == REFERENCE else speeds.of
            self._keep(name, SPEED, await measure(model, progress))

    def _warm_up(self, name: str) -> None:
        """Loads the bundled model: a precision's first load imports libraries, which is no load time."""
        spec = ModelSpec(open_checkpoint(BUNDLED), self._plan.spec.device)
        run_in_own_thread(lambda: self._load(name, spec, ignore_progress), self._threads).close()

    def _loading(self, model: LoadedModel) -> dict[str, Any]:
        footprint, spec = model.footprint, self._plan.spec
        proof = layer_errors(model, spec, self._progress(model.precision))
        return {
            "load_seconds": model.load_seconds,
            "disk_bytes": spec.checkpoint.file_bytes,
            "weights_bytes": footprint.weights_bytes,
            "kv_cache_bytes": full_cache_bytes(model.runner),
            "sequences": model.runner.slots,
            "by_dtype": dict(footprint.by_dtype),
            "quantization_state_bytes": footprint.quantization_state_bytes,
            "bits_per_weight": footprint.bits_per_weight,
            "parameters": footprint.parameters,
            "proof": None if proof is None else asdict(proof),
        }

    def _measure_quality(self, reference: LoadedModel, name: str) -> None:
        plan, text = self._plan, self._plan.text
        assert text is not None
        model = reference if name == REFERENCE else self._loaded(name)
        try:
            (found,) = run_in_own_thread(
                lambda: quality.measure(
                    reference,
                    [model],
                    text,
                    plan.tokenizer,
                    window=plan.window,
                    stride=plan.stride,
                    prompts=plan.prompts,
                    progress=self._progress(name),
                ),
                self._threads,
            )
        finally:
            if model is not reference:
                model.close()
        self._keep(name, QUALITY, asdict(found))

    def _keep(self, name: str, step: str, figures: Mapping[str, Any]) -> None:
        self._saved.keep(name, step, plain(figures))
        self._done += 1

    def _loaded(self, name: str) -> LoadedModel:
        return run_in_own_thread(
            lambda: self._load(name, self._plan.spec, self._progress(name)), self._threads
        )

    def _progress(self, name: str) -> Progress:
        def report(stage: str, current: int, total: int) -> None:
            self._on_progress(
                StepProgress(name, min(self._done + 1, self._all), self._all, stage, current, total)
            )

        return report
