"""Interleaved measurements on a model without weights, and their output."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest

from loaders.base import LoadedModel
from server.bench import session, table
from server.bench.bandwidth import Bandwidth, MemorySpeed
from server.bench.contenders import Contender, EngineContender, Prompts
from server.bench.document import Report, row_figures
from server.bench.errors import BenchError
from server.bench.figures import Figures, Run
from server.bench.processes import WorkerProcess
from server.bench.session import Plan, Row, Session, prompts_of, same_tokens
from tests.checkpoints import VOCABULARY
from tests.fakes import FakeRunner, fake_model

PLAN = Plan(batches=(1, 3), prompt=5, tokens=12, repeat=3, vocabulary=VOCABULARY, threads=1)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_PAUSE", 0.0)


class Speed(MemorySpeed):
    """Replaces the bandwidth measurement by a constant."""

    def __init__(self) -> None:
        self.buffer_bytes = 0

    def measure(self) -> Bandwidth:
        return Bandwidth(copy=2e9, read=4e9)


class Scripted:
    """Takes a tenth of a second per step; its tokens equal the engine's up to the given index."""

    name = "scripted"
    weights_bytes: int | None = 2000

    def __init__(self, log: list[str], agrees: int) -> None:
        self._log, self._agrees = log, agrees

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        self._log.append(f"{len(prompts)} × {tokens}")
        ids = [FakeRunner().expected(prompt, tokens) for prompt in prompts]
        for row in ids:
            row[self._agrees :] = [0] * (tokens - self._agrees)
        return Run([[0.1 * (i + 1) for i in range(tokens)]] * len(prompts), 0.1, ids)

    async def close(self) -> None:
        self._log.append("closed")


def slow_runner() -> FakeRunner:
    """Slow enough that the event loop sees each token separately."""
    runner = FakeRunner()
    runner.delay = 0.005
    return runner


def measure(
    runner: FakeRunner, others: list[Contender], show: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    async def make(contender: Contender) -> Contender:
        return contender

    def load() -> LoadedModel:
        return fake_model("fp32", runner)

    async def main() -> list[Row]:
        makers = [lambda other=other: make(other) for other in others]
        return await Session(PLAN, load, makers, Speed(), lambda *_: None, show).measure()

    return asyncio.run(main())


def test_the_engine_and_others_are_measured_in_turn_on_the_same_prompts() -> None:
    log: list[str] = []
    runner = slow_runner()
    shown: list[Row] = []
    rows = measure(runner, [Scripted(log, agrees=6)], shown.append)
    assert rows == shown
    assert [(row.batch, row.engine) for row in rows] == [
        (1, "bitdial"), (1, "scripted"), (3, "bitdial"), (3, "scripted"),
    ]  # fmt: skip
    assert log == ["1 × 8", *["1 × 12"] * 3, "3 × 8", *["3 × 12"] * 3, "closed"]
    assert runner.closed
    for row in rows[1::2]:
        assert row.figures.decode_tokens_per_second == pytest.approx(10 * row.batch)
        assert row.same_tokens == 0.5
        assert row.weights_bytes == 2000
        assert row.floor is None
        assert row.memory is None
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        rate = ours.figures.decode_tokens_per_second
        assert theirs.ratio == rate / theirs.figures.decode_tokens_per_second
        assert ours.ratio is ours.same_tokens is None
        assert len(ours.figures.decode_rates) == PLAN.repeat


def test_the_floor_of_a_row_is_that_of_its_batch() -> None:
    rows = measure(slow_runner(), [])
    for row in rows:
        assert row.floor is not None
        # the fake cache has 8 bytes a token, the fake model 4000 bytes of weights
        assert row.floor.kv_bytes == row.batch * (PLAN.prompt + PLAN.tokens / 2) * 8
        assert row.floor.weights_bytes == 4000
        assert row.floor.bandwidth == 2e9
        assert row.memory is not None
        assert row.memory.kv_cache_bytes == 4 * 256 * 8


def test_everything_is_closed_when_one_fails() -> None:
    log: list[str] = []
    runner = slow_runner()

    class Failing(Scripted):
        name = "failing"

        async def run(self, prompts: Prompts, tokens: int) -> Run:
            raise BenchError("it broke")

    with pytest.raises(BenchError, match="it broke"):
        measure(runner, [Scripted(log, 0), Failing(log, 0)])
    assert log[-2:] == ["closed", "closed"]
    assert runner.closed


def test_the_engine_contender_gives_every_row_its_tokens_and_times() -> None:
    runner = FakeRunner()

    async def main() -> Run:
        engine = await EngineContender(fake_model(runner=runner)).start()
        run = await engine.run(prompts_of(3, 7, VOCABULARY), 9)
        await engine.close()
        return run

    run = asyncio.run(main())
    assert run.tokens == [runner.expected(prompt, 9) for prompt in prompts_of(3, 7, VOCABULARY)]
    assert all(len(row) == 9 and list(row) == sorted(row) for row in run.arrivals)
    assert run.prefill_seconds > 0


def test_agreement_ends_at_the_first_difference() -> None:
    one, other = Run([[1.0]], 1.0, [[1, 2, 3, 4]]), Run([[1.0]], 1.0, [[1, 2, 9, 4]])
    assert same_tokens(one, other) == 0.5
    assert same_tokens(one, one) == 1.0
    assert same_tokens(one, replace(other, tokens=())) is None


def test_a_line_is_aligned_with_its_heading() -> None:
    rows = measure(slow_runner(), [Scripted([], agrees=12)])
    names, units, rule = table.WHOLE.heading().splitlines()
    for row in rows:
        line = table.WHOLE.line(row)
        assert len(line) <= len(rule)
        start = names.index("decode") - 2  # right-aligned, eight wide
        assert f"{row.figures.decode_tokens_per_second:.1f}" == line[start : start + 8].strip()
    assert "tok/s" in units
    explained = table.LEGEND.replace("ITL", "ITL p50 ITL p99")
    assert all(column.name in explained for column in table.COLUMNS[3:])


def measured_as(*ratios: float, spread: float = 0.1) -> Row:
    """A row compared with bitdial's, with these ratios in its repeats."""
    figures = Figures(100.0, 10.0, spread, 5.0, 1.0, 2.0)
    return Row("fp16", 1, "scripted", figures, ratio=median(ratios), ratios=ratios)


@pytest.mark.parametrize(
    ("ratios", "shown"),
    [
        ((1.2, 1.1, 1.3), "1.20"),
        ((0.4, 0.5, 0.6), "0.50"),
        ((1.2, 0.9, 1.3), "1.20?"),
        ((0.25, 0.1, 2.0), "0.25?"),
    ],
)
def test_a_ratio_is_doubted_where_the_repeats_disagree(ratios: tuple[float, ...], shown: str) -> None:
    assert table.WHOLE.line(measured_as(*ratios)).split()[-1] == shown
    assert row_figures(measured_as(*ratios))["bitdial_ratios"] == list(ratios)


def test_a_noisy_host_is_reported() -> None:
    quiet = measured_as(1.0, spread=0.2)
    assert table.warning([]) is table.warning([quiet]) is None
    warning = table.warning([quiet, measured_as(1.0, spread=2.44)])
    assert warning is not None
    assert warning.startswith(
        "This host was too noisy: the decode rates of a row lay up to 244% apart (scripted, fp16, 1 rows)."
    )


def test_the_ratios_are_those_of_the_repeats() -> None:
    ours, theirs, *_ = measure(slow_runner(), [Scripted([], agrees=12)])
    rates = zip(ours.figures.decode_rates, theirs.figures.decode_rates, strict=True)
    assert theirs.ratios == tuple(one / other for one, other in rates)
    assert ours.ratios == ()


def test_the_report_is_one_line_of_json_and_readable_text() -> None:
    report = Report({"cpu": "x"}, {"name": "fake"}, {"repeat": 3})
    for row in measure(slow_runner(), [Scripted([], agrees=12)]):
        report.add(row)
    report.sections["http"] = [{"ttft_p50_ms": float("nan")}]
    line = report.line()
    assert "\n" not in line
    found = json.loads(line)
    assert found == json.loads(report.text())
    ours, theirs = found["rows"][:2]
    assert ours["floor"]["share"] == pytest.approx(
        ours["decode_tokens_per_second"] / ours["floor"]["tokens_per_second"]
    )
    assert ours["floor"]["share_of_read"] == pytest.approx(ours["floor"]["share"] / 2)
    assert theirs["bitdial_ratio"] == pytest.approx(
        ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"]
    )
    assert theirs["same_tokens"] == 1.0
    assert found["http"] == [{"ttft_p50_ms": None}]


def test_a_worker_process_loads_runs_and_reports_errors() -> None:
    async def main() -> None:
        with WorkerProcess("tests.bench_worker") as process:
            assert process.ask(do="versions") == {"counting": "1.0"}
            contender = await process.load("one", "counting", first=10)
            assert (contender.name, contender.weights_bytes) == ("one", 12)
            run = await contender.run([[1, 2], [1, 2]], 3)
            assert run.tokens == [[12, 13, 14]] * 2
            assert [list(row) for row in run.arrivals] == [[0.1, 0.2, 0.1 * 3]] * 2
            with pytest.raises(BenchError, match="ValueError: too many"):
                await contender.run([[1]], 101)
            await contender.close()
            with pytest.raises(BenchError, match="KeyError"):
                await contender.run([[1]], 2)
            dying = await process.load("two", "counting", first=0)
            with pytest.raises(BenchError, match="status 3"):
                await dying.run([[1]], 99)

    asyncio.run(main())
