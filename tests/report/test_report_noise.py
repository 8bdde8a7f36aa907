"""Reports on a noisy host: repeated runs, a warning as first sentence, and only significant conclusions."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from server.bench.figures import Run
from server.report.advice import advise
from server.report.certainty import Interval, interval_of, perhaps_best
from server.report.choice import Bounds, NoneFits, choose
from server.report.columns import cells
from server.report.markdown import markdown
from server.report.measuring import measure, speed
from server.report.measuring.measure import Measurement, Plan
from server.report.measuring.speed import Pauses, Speeds, settled
from server.report.noise import noise
from server.report.rows import Row, dominates, front, rows_of
from server.report.store import SavedReport
from server.report.subject import subject_of
from tests.fakes import FakeRunner, fake_checkpoint, fake_model
from tests.report.test_report_advice import ALL, FP4, FP32, INT8, NF4, batch
from tests.routes.test_report_route import READING

WILD = [0.1, 0.2, 0.9, 0.25, 2.5, 0.15, 0.3, 2.44]
"""fp16's speeds relative to fp32's in successive runs: the median is 0.275, and nothing follows from it."""


@pytest.mark.parametrize(
    ("count", "low", "high"), [(5, 1, 5), (7, 1, 7), (8, 2, 7), (12, 3, 10), (20, 6, 15)]
)
def test_an_interval_for_the_median(count: int, low: float, high: float) -> None:
    assert interval_of([*range(1, count + 1)]) == Interval(low, high, count)
    assert interval_of([*range(count, 0, -1)]) == Interval(low, high, count)


def test_four_values_have_no_interval() -> None:
    assert interval_of([1.0, 1.0, 1.0, 1.0]) == Interval(0.0, math.inf, 4)
    assert math.isinf(interval_of([1.0]).factor)


def test_one_outlier_does_not_widen_an_interval() -> None:
    assert interval_of([0.01, 1.98, 1.99, 2.0, 2.0, 2.0, 2.01, 2.02]).factor == pytest.approx(2.01 / 1.98)


def test_candidates_for_the_best() -> None:
    found = [Interval(1, 3), Interval(2.5, 2.6), Interval(0.5, 2.4), Interval(2.6, 9)]
    assert perhaps_best(found, lambda one: one) == [found[0], found[1], found[3]]


def spread(row: Row, low: float, high: float, rows: int = 1) -> Row:
    """The row with this interval of its speed ratio to fp32."""
    return replace(row, ratio_intervals={**row.ratio_intervals, rows: Interval(low, high, 20)})


def document(**precisions: dict[str, Any]) -> dict[str, Any]:
    """A report from the speeds of each precision; weights decrease from one to the next."""
    steps: dict[str, Any] = {}
    for number, (name, batches) in enumerate(precisions.items()):
        loading = {
            "disk_bytes": 1, "weights_bytes": 8 - number, "kv_cache_bytes": 2, "bits_per_weight": 32.0,
            "load_seconds": 1.0, "proof": None,
        }  # fmt: skip
        figures = {"prompt": 32, "tokens": 48, "batches": batches}
        steps[name] = {"loading": loading, "speed": figures}
    host = {"gpu": None, "cpu": "a CPU", "threads": 2, "kernels": "torch"}
    model = {"name": "m", "architecture": "A", "revision": None, "file_bytes": 1, "vocabulary": 300}
    return {
        "model": model, "host": host, "versions": {}, "text": {}, "precisions": steps, "failed": {},
        "finished": None,
    }  # fmt: skip


def test_a_median_of_runs_far_apart_is_no_conclusion() -> None:
    """``fp16 0.25 ×`` while runs lay 244 % apart."""
    quiet = batch([99.0, 100.0, 101.0, 100.0, 100.0])
    wild = batch([100 * one for one in WILD], [100.0] * 8)
    slow = batch([50.0, 51.0, 50.0, 49.0, 50.0], [100.0] * 5)
    report = document(fp32={"1": quiet, "8": quiet}, fp16={"1": wild, "8": wild}, int8={"1": slow, "8": slow})
    rows = rows_of(report)
    assert rows[1].speed_ratio == pytest.approx(0.275)
    assert rows[1].ratio_interval() == Interval(0.15, 2.44, 8)
    first, *others = advise(rows).sentences
    assert first == (
        "This host was too noisy: after up to 8 runs, fp16's speed at 1 row lies between 0.15 and 2.44 × "
        "fp32's and fp16's speed at 8 rows lies between 0.15 and 2.44 × fp32's. Nothing is concluded from "
        "speeds that can't be told apart; `bitdial report` measures these again, best on an idle host."
    )
    assert "int8 is slower than fp32 here: 0.50 × its speed." in others
    assert not any("fp16 is slower" in one or "fp16 if one stream" in one for one in others)
    assert markdown(report).splitlines()[2] == f"**{first}**"
    _, fp32, fp16, int8 = cells(report, rows)
    assert [line[-3:] for line in (fp32, fp16, int8)] == [
        ["100", "100", "1.00"],
        ["~28", "~28", "0.15 – 2.44"],
        ["50", "50", "0.50"],
    ]


@pytest.mark.parametrize("order", [("nf4", "int8"), ("int8", "nf4")])
def test_among_equal_speeds_the_smaller_is_recommended(order: Sequence[str]) -> None:
    """Whichever was faster by chance."""
    medians = dict(zip(order, (2.2, 1.1), strict=True))
    rows = [FP32] + [
        spread(replace(one, speed_ratios={1: medians[one.precision], 8: 2.0}), 0.5, 4.0)
        for one in (INT8, NF4)
    ]
    advice = advise(rows)
    assert advice.precision == "nf4"
    warning, first, second, *others = advice.sentences
    assert warning.startswith(
        "This host was too noisy: after up to 20 runs, int8's speed at 1 row lies between"
    )
    assert first == (
        "Run nf4: 4.0 × smaller, perplexity +1.9 %, its speed between 0.50 and 4.00 × fp32's here."
    )
    assert second == (
        "It is the smallest of those that may be the best balance of size and speed (int8 too): "
        "their speeds can't be told apart."
    )
    assert not any("one stream" in one or "slower" in one for one in others)


def test_a_significantly_higher_speed_is_given_with_its_interval() -> None:
    advice = advise([FP32, spread(NF4, 1.4, 3.0)])
    assert "2.2 × faster (1.40 to 3.00 × fp32's speed) here." in advice.sentences[1]
    (alone,) = advise([FP32, spread(NF4, 2.15, 2.25)]).sentences[:1]
    assert alone == "Run nf4: 4.0 × smaller, perplexity +1.9 %, 2.2 × faster here."


def test_slower_requires_the_whole_interval() -> None:
    slow = replace(INT8, speed_ratios={1: 0.8, 8: 0.8})
    expected = "int8 is slower than fp32 here: 0.80 × its speed."
    assert expected in advise([FP32, spread(slow, 0.7, 0.9)]).sentences
    assert expected not in advise([FP32, spread(slow, 0.7, 1.01)]).sentences


def test_a_precision_leaves_the_front_where_another_is_known_to_be_better() -> None:
    assert dominates(NF4, FP4)
    assert not dominates(spread(NF4, 1.0, 3.0), FP4)
    assert front([spread(one, 0.5, 4.0) for one in ALL]) == {one.precision for one in ALL}
    # equal with narrow intervals: the one that is worse otherwise leaves the front
    alike = [spread(one, 2.1, 2.2) for one in (NF4, FP4)]
    assert dominates(*(replace(one, speed_ratios={1: 2.15}) for one in alike))


def test_drift_of_fp32_is_reported() -> None:
    rates = {1: 100.0, 8: 400.0}
    rows = [FP32, replace(NF4, reference_rates=rates), replace(INT8, reference_rates={1: 60.0, 8: 400.0})]
    assert noise(rows) == [
        "This host was too noisy: fp32 itself decoded between 60 and 100 tokens a second at 1 row "
        "while the others were measured in turn with it: compare the ratios, not the rates."
    ]
    assert noise([FP32, replace(NF4, reference_rates=rates)]) == []


def test_many_uncertain_speeds_are_counted() -> None:
    wide = [spread(one, 0.5, 4.0) for one in ALL[1:]] + [
        replace(FP32, rate_intervals={1: Interval(31, 52, 20)})
    ]
    (sentence,) = noise(wide)
    assert "int8's speed at 1 row lies between" in sentence
    assert "and 2 more are as uncertain." in sentence
    (only,) = noise(wide[-1:])
    assert "fp32's speed at 1 row lies between 31 and 52 tokens a second." in only


def test_auto_ignores_insignificant_speed_differences() -> None:
    rows = [FP32, spread(INT8, 1.0, 3.0), spread(NF4, 0.9, 2.6)]
    found = choose(rows, Bounds(prefer="speed"))
    assert (found.precision, found.decided_by) == ("nf4", ("prefer",))
    assert found.reason == (
        "nf4 is the fastest of the 3 measured here; it is smaller than int8, fp32, from whose speed its own "
        "can't be told apart"
    )
    apart = [FP32, spread(INT8, 2.7, 3.0), spread(NF4, 0.9, 2.6)]
    assert choose(apart, Bounds(prefer="speed")).precision == "int8"


def test_a_minimum_speed_requires_the_whole_interval_if_possible() -> None:
    least = Bounds(min_tokens_per_second=170, prefer="quality")
    doubtful = replace(INT8, rate_intervals={1: Interval(120, 250, 20)})  # 180 in the middle
    assert choose([FP32, doubtful, NF4], least).precision == "nf4"
    found = choose([FP32, doubtful], least)
    assert found.precision == "int8"
    assert found.reason.endswith(
        "; whether it keeps to min_tokens_per_second can't be told: its speed is between 120.0 tokens a "
        "second and 250.0"
    )
    slow = replace(INT8, rate_intervals={1: Interval(120, 160, 20)})
    with pytest.raises(NoneFits, match="the nearest is int8"):
        choose([FP32, slow], least)


class Rated:
    """Decodes at successive rates, the same for every row. Counts its runs in a shared log."""

    weights_bytes = None

    def __init__(self, name: str, rates: Sequence[float], log: list[str]) -> None:
        self.name, self._rates, self._log = name, cycle(rates), log

    async def run(self, prompts: Any, tokens: int) -> Run:
        self._log.append(self.name)
        if tokens == speed._WARM_UP:
            return Run([[1.0]], 1.0)
        rate = next(self._rates)
        return Run([[step / rate for step in range(1, tokens + 1)]] * len(prompts), 0.1)


def rounds_of(own: Sequence[float], fp32: Sequence[float]) -> tuple[list[list[Run]], list[str]]:
    log: list[str] = []
    engines: Any = [Rated("own", own, log), Rated("fp32", fp32, log)]
    speeds = Speeds(1, Pauses(), lambda: fake_model())
    return asyncio.run(speeds._rounds(engines, [[1]], 48, 1000)), log[2:]


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PAUSE", 0.0)


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(
    ("own", "fp32", "expected"),
    [
        ([200.0], [100.0], 5),
        ([200.0, 50.0], [100.0, 25.0], 5),  # a busy minute affects both
        ([200.0, 210.0, 190.0, 205.0, 200.0, 205.0, 205.0], [100.0], 8),  # 190 and 210 are the outermost of 8
        ([100 * one for one in WILD], [100.0], 20),  # no runs are left
        ([1.2, 0.4], [0.8], 5),  # runs of a minute
    ],
)
def test_runs_far_apart_are_repeated(own: Sequence[float], fp32: Sequence[float], expected: int) -> None:
    rounds, log = rounds_of(own, fp32)
    assert len(rounds) == expected
    assert log == (["own", "fp32", "fp32", "own"] * 10)[: 2 * expected]
    found = speed._figures(rounds, 32)
    assert found["decode_rates"] == pytest.approx([rate for rate, _ in zip(cycle(own), rounds, strict=False)])
    assert found["reference_rates"] == pytest.approx(
        [rate for rate, _ in zip(cycle(fp32), rounds, strict=False)]
    )
    ratios = [a / b for a, b, _ in zip(cycle(own), cycle(fp32), rounds, strict=False)]
    assert found["ratios"] == pytest.approx(ratios)
    assert settled({"batches": {"1": found}}) is (interval_of(ratios).factor <= 1.1)


def test_uncertain_speeds_are_measured_again_by_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PAUSE": 0.0, "SECONDS": 0.0, "TOKENS": 8, "CLOSE": math.inf}.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(measure, "layer_errors", lambda *_: None)
    loaded: list[str] = []

    def load(name: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
        if spec.checkpoint.model_id == "fake":
            loaded.append(name)
        return fake_model(name, FakeRunner(slots=8))

    spec = ModelSpec(fake_checkpoint(tmp_path), slots=8)
    plan, kept = Plan(spec, ("bf16", "nf4"), None), SavedReport(subject_of(spec), READING)
    Measurement(plan, kept, load=load).run()
    assert loaded == ["fp32", "bf16", "nf4"]
    for name in ("fp32", "bf16", "nf4"):
        for figures in kept.document["precisions"][name]["speed"]["batches"].values():
            figures["ratios"] = [2.0] * 5
            figures["decode_rates"] = [100.0] * 5
    kept.document["precisions"]["bf16"]["speed"]["batches"]["8"]["ratios"] = WILD
    monkeypatch.setattr(speed, "CLOSE", 1.1)
    finished = kept.document["finished"] = "2026-01-01T00:00:00Z"

    def interrupted(name: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Measurement(plan, kept, load=interrupted).run()
    assert kept.document["finished"] == finished  # all figures are there still

    monkeypatch.setattr(speed, "MOST_REPEAT", 5)
    loaded.clear()
    Measurement(plan, kept, load=load).run()
    assert loaded == ["bf16", "fp32"]
    assert kept.get("bf16", "speed")["batches"]["8"]["ratios"] != WILD
    assert kept.get("nf4", "speed")["batches"]["8"]["ratios"] == [2.0] * 5
    assert kept.document["finished"] > finished
