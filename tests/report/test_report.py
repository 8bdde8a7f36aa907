"""``bitdial report``: stored step by step; its output; its errors."""

import asyncio
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loaders
from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.errors import OutOfMemory
from loaders.texts import Text, text_file
from server.__main__ import main
from server.bench.errors import BenchError
from server.bench.figures import Run
from server.report import plots, store
from server.report.measuring import speed
from server.report.measuring.measure import Measurement, Plan, StepProgress
from server.report.measuring.speed import Pauses, Speeds
from server.report.store import SavedReport
from server.report.subject import Reading, slots, subject_of
from tests import checkpoints
from tests.fakes import FakeRunner, fake_model

WORDS = "the other theatre, and in another one, the café again\n" * 40


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, one run, no pauses: the figures don't matter."""
    monkeypatch.setattr(speed, "TOKENS", 12)
    monkeypatch.setattr(speed, "REPEAT", 1)
    monkeypatch.setattr(speed, "CLOSE", math.inf)
    monkeypatch.setattr(speed, "PAUSE", 0.0)
    monkeypatch.setattr(speed, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Text:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return text_file(path)


class Counted:
    """Counts the calls of ``loaders.load``; may fail before one."""

    def __init__(self, model_id: str) -> None:
        self.model_id, self.names = model_id, list[str]()
        self.before: Callable[[str], None] = lambda name: None

    def __call__(self, name: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
        if spec.checkpoint.model_id == self.model_id:
            self.before(name)
            self.names.append(name)
        return loaders.load(name, spec, progress)


def plan_of(folder: Path, text: Text | None, *precisions: str) -> Plan:
    spec = ModelSpec(open_checkpoint(str(folder)), slots=slots())
    return Plan(spec, precisions, text, load_tokenizer(spec.checkpoint), 64, None, 2)


def kept_of(plan: Plan, text: Text) -> SavedReport:
    return SavedReport(subject_of(plan.spec), Reading.of(text, plan.window, plan.stride, plan.prompts))


def test_an_interrupted_report_resumes(folder: Path, text: Text) -> None:
    plan, load = plan_of(folder, text, "bf16", "nf4"), Counted(folder.name)

    def interrupt(name: str) -> None:
        if name == "nf4":
            raise KeyboardInterrupt

    load.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        Measurement(plan, kept_of(plan, text), load=load).run()
    assert load.names == ["fp32", "bf16"]
    half = kept_of(plan, text)
    assert {name: sorted(steps) for name, steps in half.document["precisions"].items()} == {
        "fp32": ["loading", "speed"],
        "bf16": ["loading", "speed"],
    }
    assert store.latest(subject_of(plan.spec)) is None

    seen: list[StepProgress] = []
    again = Counted(folder.name)
    Measurement(plan, half, seen.append, load=again).run()
    assert again.names == [
        "nf4",
        "fp32",
        "fp32",
        "bf16",
        "nf4",
    ]  # fp32 for nf4's speed, and for the quality of all
    assert (seen[0].step, seen[0].steps, seen[0].precision) == (5, 9, "nf4")
    assert seen[-1].step == 9
    assert half.document["precisions"]["fp32"]["speed"] == kept_of(plan, text).get("fp32", "speed")
    found = store.latest(subject_of(plan.spec))
    assert found is not None
    assert found[0] == half.document

    idle = Counted(folder.name)
    whole = kept_of(plan, text)
    Measurement(plan, whole, load=idle).run()
    assert not idle.names
    assert whole.document["finished"] == half.document["finished"]


def test_the_figures_are_those_of_the_models(folder: Path, text: Text) -> None:
    plan = plan_of(folder, text, "nf4")
    kept = kept_of(plan, text)
    Measurement(plan, kept).run()
    model = loaders.load("nf4", plan.spec)
    loading, quality = kept.get("nf4", "loading"), kept.get("nf4", "quality")
    assert loading["weights_bytes"] == model.footprint.weights_bytes
    assert loading["disk_bytes"] == (folder / "model.safetensors").stat().st_size
    assert loading["proof"]["quantized_share"] > 0.5
    assert {one["name"] for one in loading["proof"]["layers"] if one["quantized"]} == set(
        model.footprint.quantized
    )
    assert (quality["window"], quality["stride"], quality["greedy"]["prompts"]) == (64, 32, 2)
    assert kept.get("fp32", "quality")["mean_kl"] == 0 < quality["mean_kl"]
    for name in ("fp32", "nf4"):
        for rows in ("1", "8"):
            figures = kept.get(name, "speed")["batches"][rows]
            assert figures["decode_tokens_per_second"] > 0
            assert figures["inter_token_ms"] == sorted(figures["inter_token_ms"])
    assert kept.get("fp32", "speed")["batches"]["1"]["ratio_to_fp32"] == 1.0


def test_another_text_another_way_or_another_model_is_another_report(
    folder: Path, text: Text, tmp_path: Path
) -> None:
    plan = plan_of(folder, text)
    same = kept_of(plan, text).folder
    (tmp_path / "renamed.txt").write_text(WORDS, encoding="utf-8")
    assert kept_of(plan, text_file(tmp_path / "renamed.txt")).folder == same
    (tmp_path / "other.txt").write_text(WORDS + "x", encoding="utf-8")
    assert kept_of(plan, text_file(tmp_path / "other.txt")).folder != same
    subject = subject_of(plan.spec)
    assert SavedReport(subject, Reading.of(text, 32, None, 2)).folder != same
    twin = checkpoints.save(checkpoints.gpt2(seed=1), tmp_path / folder.name)
    other = subject_of(ModelSpec(open_checkpoint(str(twin)), slots=1))
    assert other.model["name"] == subject.model["name"]
    assert other.key != subject.key
    assert subject_of(ModelSpec(plan.spec.checkpoint, slots=99)).key == subject.key
    assert subject_of(ModelSpec(plan.spec.checkpoint, double_quantization=True)).key != subject.key


def test_a_precision_that_fails_is_noted_and_tried_again(folder: Path, text: Text) -> None:
    plan, load = plan_of(folder, text, "bf16", "nf4"), Counted(folder.name)

    def fail(name: str) -> None:
        if name == "bf16":
            raise OutOfMemory("no room for bf16")

    load.before = fail
    kept = kept_of(plan, text)
    Measurement(plan, kept, load=load).run()
    assert set(kept.document["failed"].values()) == {"no room for bf16"}
    assert kept.get("nf4", "quality") is not None
    assert kept.document["finished"]
    again = kept_of(plan, text)
    Measurement(plan, again).run()
    assert not again.document["failed"]
    assert again.get("bf16", "quality") is not None


def test_a_report_needs_fp32(folder: Path, text: Text) -> None:
    plan, load = plan_of(folder, text, "bf16"), Counted(folder.name)

    def fail(name: str) -> None:
        raise OutOfMemory("no room")

    load.before = fail
    with pytest.raises(OutOfMemory):
        Measurement(plan, kept_of(plan, text), load=load).run()


def test_broken_stored_measurements_are_repeated(folder: Path, text: Text) -> None:
    plan = plan_of(folder, None)
    kept = kept_of(plan, text)
    Measurement(plan, kept).run()
    (kept.folder / store.NAME).write_text('{"format"')
    assert store.latest(subject_of(plan.spec)) is None
    assert not kept_of(plan, text).document["precisions"]


def test_a_run_with_a_pause_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, runner = Pauses(), FakeRunner(slots=8)

    def stopped_once(slots: Any) -> None:
        if len(runner.batches) == 20:  # in a run of one row, after warming up
            pauses.count += 1

    runner.on_decode = stopped_once
    monkeypatch.setattr(speed, "TOKENS", 16)

    async def measure() -> dict[str, Any]:
        speeds = Speeds(1, pauses, lambda: fake_model())
        found = await speeds.of_reference(fake_model("fp32", runner), ignore_progress)
        await speeds.close()
        return found

    found = asyncio.run(measure())
    rates = [len(figures["decode_rates"]) for figures in found["batches"].values()]
    assert rates == [1, 1]
    alone = runner.batches.count(1)
    assert alone == 1 + 7 + 2 * 15  # the engine's first token, warming up, and the run twice
    assert runner.closed


class Staggered:
    """Rows that begin a tenth of a second apart and then have a token every hundredth."""

    name, weights_bytes = "staggered", None

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def run(self, prompts: Any, tokens: int) -> Run:
        self.asked.append(tokens)
        rows = [[0.1 * row + 0.01 * step for step in range(tokens)] for row in range(len(prompts))]
        return Run(rows, rows[-1][0])


def test_rows_with_little_overlap_generate_more_tokens() -> None:
    engine: Any = Staggered()
    speeds = Speeds(1, Pauses(), lambda: fake_model())
    (rounds,) = asyncio.run(speeds._rounds([engine], [[1]] * 8, 48, 1000))
    assert engine.asked == [8, 48, 96, 192]  # the last begins 70 tokens after the first
    assert 780 < rounds[0].decode_rate < 820
    with pytest.raises(BenchError, match="8 rows end before all have begun"):
        asyncio.run(speeds._rounds([engine], [[1]] * 8, 48, 60))


def run(folder: Path, text: Text, *more: str) -> int:
    source = str(Path(text.open().name))
    return main(
        ["report", "--model", str(folder), "--text", source, "--window", "64", "--prompts", "2", *more]
    )


def test_the_command_writes_the_announced_files(
    folder: Path, text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(folder, text, "--precisions", "nf4,int8", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("This host was too noisy: after 1 run, ")  # too few for a conclusion
    heading = next(line for line in printed.splitlines() if "MB" in line)
    assert heading.split()[:3] == ["precision", "disk", "MB"]
    document = json.loads((out / "report.json").read_text())
    assert list(document["precisions"]) == ["fp32", "nf4", "int8"]
    assert document["recommendation"]["sentences"]
    sentence = document["recommendation"]["sentences"][0]
    assert " ".join(printed.split("▸ ")[1].split()) == sentence
    markdown = (out / "report.md").read_text()
    assert f"**{sentence}**" in markdown
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown)
    assert shown
    for name in shown:
        assert (out / name).read_text().lstrip().startswith("<?xml")
        assert (out / name.replace(".svg", ".png")).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(shown)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r'<script|(?:src|href)="(?!#|data:)|@import|url\((?!#)', page)  # no external files
    assert str(folder) not in page + markdown + json.dumps(document)  # a folder's name, never its path


def test_all_precisions_and_no_quality(
    folder: Path, text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(folder, text, "--precisions", "all", "--no-quality", "--no-plots", "--out", str(out)) == 0
    document = json.loads((out / "report.json").read_text())
    assert set(document["precisions"]) == set(loaders.direct("cpu"))
    assert not list(out.glob("plots/*"))
    assert "perplexity" not in capsys.readouterr().out.split("\n\n")[1]
    assert "Nothing is said here about quality" in (out / "report.md").read_text()


def test_without_matplotlib_there_is_a_report_without_plots(
    folder: Path, text: Text, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert run(folder, text, "--precisions", "fp32", "--no-quality") == 0
    assert "No plots: the plots need matplotlib: pip install matplotlib" in capsys.readouterr().out


def test_requested_plots_need_matplotlib(
    folder: Path, text: Text, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert run(folder, text, "--plots") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bitdial report: the plots need matplotlib: pip install matplotlib; or --no-plots"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--precisions", "int3"], 2, "unknown precision 'int3'"),
        (["--text", "/nowhere.txt"], 1, "nowhere.txt is not a file"),
        (["--model", "/nowhere"], 1, "nowhere"),
        (["--window", "100000", "--precisions", "fp32"], 1, "a window has from 2 to"),
    ],
)
def test_refusals_are_one_line(
    folder: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--model", str(folder), *arguments]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bitdial report: ")
    assert message in last
