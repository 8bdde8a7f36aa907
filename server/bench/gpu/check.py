"""All parts in order: correctness first, then speed. Each finding is saved immediately."""

import gc
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from transformers.utils import logging as transformers_logging

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.cuda.cuda_graphs import release_unused
from server.bench import table
from server.bench.bandwidth import MemorySpeed
from server.bench.gpu import correctness, models, over_http, rivals, speed, suite, targets
from server.bench.gpu.budget import Budget, TimeUp, another_process
from server.bench.gpu.facts import card_name, introduction, new_report
from server.bench.gpu.options import Options, parse
from server.bench.gpu.result import Result, default_file
from server.bench.gpu.speed import Subject
from server.bench.session import Plan
from server.host.threads import compute_with, default_threads

_TESTS = 130.0  # seconds that the tests may take
_ONE = {"correctness": 12.0, "speed": 25.0, "continuous": 20.0, "http": 45.0, "xl": 40.0, "steady": 12.0}
_ONE |= {"kernels": 15.0, "compile": 75.0}
"""Seconds that a part may need for one precision; with fewer left it is skipped."""
_FEW, _TWO = ("fp32", "int8", "nf4"), ("fp32", "nf4")
_FOUR, _COMPILED = ("bf16", "nf4", "int8", "fp32"), ("bf16", "fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all passed; 1: a check failed; 2: the time ended before all parts."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "there is no CUDA device; --device cpu --quick rehearses the check without one", file=sys.stderr
        )
        return 1
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    budget = Budget(options.seconds)
    with TemporaryDirectory(prefix="bitdial-gpu-") as folder:
        check = Check(options, budget, Path(folder))
        try:
            with budget.enforced(check.result.save):
                check.run()
        except TimeUp:
            check.result.skipped("what was under way, and all after it", "the time was over")
        return check.conclude()


class Check:
    """One run.

    Args:
        folder: for generated models; deleted afterwards.
    """

    def __init__(self, options: Options, budget: Budget, folder: Path) -> None:
        self._options, self._budget, self._folder = options, budget, folder
        self._device = cast(Literal["cuda", "cpu"], options.device)
        self._sizes = sizes = options.sizes
        self._model = options.model or str(self._made(sizes.small))
        checkpoint = open_checkpoint(self._model)
        self._name = checkpoint.model_id
        threads = default_threads()
        compute_with(threads)
        memory = MemorySpeed(self._device, threads)
        report = new_report(options, checkpoint, memory)
        print(introduction(report), flush=True)
        file = options.out or default_file(card_name(self._device))
        file.parent.mkdir(parents=True, exist_ok=True)
        self.result, self._file = Result(report, file), file
        self.result.save()
        plan = Plan(
            sizes.batches,
            sizes.prompt,
            sizes.tokens,
            sizes.repeat,
            checkpoint.vocabulary,
            threads,
        )
        spec = ModelSpec(checkpoint, device=self._device, slots=max(sizes.batches))
        self._subject = Subject(self._name, spec, plan, memory, self.result)
        self._precisions = [name for name in options.precisions if self._able(name)]

    def run(self) -> None:
        parts: dict[str, Callable[[], None]] = {
            "tests": self._tests,
            "correctness": self._correctness,
            "speed": self._speed,
            "kernels": self._kernels,
            "continuous": self._continuous,
            "http": self._http,
            "xl": self._xl,
            "steady": self._steady,
            "compile": self._compile,
        }
        for name in self._options.parts:
            print(f"\n{name}, after {self._budget.spent:.0f} s\n{'─' * 40}", flush=True)
            self._guarded(name, parts[name])
        self.result.finish()

    def conclude(self) -> int:
        """Evaluates the targets, prints the result and returns the exit code."""
        sections = self.result.sections
        judged = targets.judged(self.result.rows, sections.get("kernels", []), self._name)
        sections["targets"], sections["seconds"] = judged, round(self._budget.spent, 1)
        self.result.save()
        print("\n".join(["", table.LEGEND, "", *map(targets.line, judged), ""]))
        print("\n".join(f"FAILED  {failure}" for failure in sections["failures"]))
        print(
            f"{'all is right' if self.result.sound else 'NOT all is right'}; figures: {self._file}",
            flush=True,
        )
        return (0 if sections["complete"] else 2) if self.result.sound else 1

    # parts

    def _tests(self) -> None:
        found = suite.run(min(_TESTS, self._budget.left))
        if isinstance(found, str):
            self.result.skipped("tests", found)
            return
        print(found.counts, flush=True)
        self.result.note("tests", asdict(found))
        for fault in found.faults():
            self.result.failed(f"tests: {fault}")

    def _correctness(self) -> None:
        spec = ModelSpec(self._subject.spec.checkpoint, device=self._device, slots=self._sizes.slots)

        def check(precision: str) -> None:
            found = correctness.check(precision, spec)
            print(found.line(), flush=True)
            self.result.note("correctness", asdict(found))
            for fault in found.faults(self._device == "cuda"):
                self.result.failed(fault)

        self._each("correctness", self._precisions, check)

    def _speed(self) -> None:
        print(table.WHOLE.heading(), flush=True)
        self._each("speed", self._precisions, lambda name: speed.measure(self._subject, name))

    def _continuous(self) -> None:
        self._rival("continuous", rivals.CONTINUOUS, self._among(_FOUR), self._sizes.batches[-1])

    def _compile(self) -> None:
        self._rival("compile", rivals.STATIC, self._among(_COMPILED), 1)

    def _http(self) -> None:
        if lacking := over_http.missing():
            self.result.skipped("http", f"{', '.join(lacking)} not installed")
            return
        streams, seconds = self._sizes.streams, self._sizes.load_seconds
        self._each(
            "http",
            self._among(_TWO),
            lambda name: over_http.measure(self._subject, self._model, name, streams, seconds),
        )

    def _xl(self) -> None:
        sizes, small = self._sizes, self._subject
        if self._budget.left < _ONE["xl"]:
            self.result.skipped("xl", "no time was left")
            return
        checkpoint = open_checkpoint(str(self._made(sizes.large)))
        slots = max(sizes.large_batches)
        spec = ModelSpec(checkpoint, device=self._device, slots=slots, context=sizes.large_context)
        vocabulary, threads = checkpoint.vocabulary, small.plan.threads
        plan = Plan(sizes.large_batches, sizes.prompt, sizes.large_tokens, 1, vocabulary, threads)
        large = Subject(sizes.large.name, spec, plan, small.speed, self.result)
        print(table.WHOLE.heading(), flush=True)
        self._each("xl", self._among(_FOUR), lambda name: speed.measure(large, name))

    def _steady(self) -> None:
        """Measures a server's default settings."""
        of, slots = self._subject, self._sizes.slots
        spec = ModelSpec(of.spec.checkpoint, device=self._device, slots=slots)
        plan = Plan((1, slots), of.plan.prompt, of.plan.tokens, 1, of.plan.vocabulary, of.plan.threads)
        subject = Subject(of.model, spec, plan, of.speed, self.result)
        print(table.WHOLE.heading(), flush=True)
        self._each("steady", self._among(_FEW), lambda name: speed.measure_steady(subject, name))

    def _kernels(self) -> None:
        def measure(precision: str) -> None:
            with another_process() as process:  # one each: an error may leave the GPU context unusable
                speed.measure_kernels(self._subject, precision, process)

        self._each("kernels", self._precisions, measure)

    # shared

    def _rival(self, part: str, which: str, precisions: Sequence[str], batch: int) -> None:
        of = self._subject
        print(table.WHOLE.heading(), flush=True)
        self._each(
            part,
            precisions,
            lambda name: rivals.measure_into(self.result, of.model, of.spec, of.plan, name, which, batch),
        )

    def _each(self, part: str, precisions: Sequence[str], work: Callable[[str], None]) -> None:
        """Runs ``work`` for each precision; a failure is reported and the next one runs."""
        for name in precisions:
            if not self._options.quick and self._budget.left < _ONE[part]:
                self.result.skipped(f"{part} {name}", "no time was left")
                continue
            self._guarded(f"{part} {name}", partial(work, name))
            gc.collect()
            if self._device == "cuda":
                release_unused()

    def _guarded(self, what: str, work: Callable[[], None]) -> None:
        """Runs ``work``; an exception is reported as a failure and not raised."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            self.result.failed(f"{what}: {type(error).__name__}: {lines[0][:300]}")

    def _among(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._precisions]

    def _made(self, shape: models.Shape) -> Path:
        return models.make(shape, self._folder / shape.name, self._device, self._options.tokenizer)

    def _able(self, precision: str) -> bool:
        able: Any = loaders.availability(precision, self._device)
        if not able.ok:
            self.result.skipped(precision, able.reason)
        return bool(able.ok)
