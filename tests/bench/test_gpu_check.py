"""``gpu_check`` without a GPU: every part that a CPU can run, on tiny models."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from loaders.base import LoadedModel
from loaders.checkpoint import open_checkpoint
from loaders.cuda.graph_runner import GraphRunner
from server.bench.figures import Figures
from server.bench.gpu import check, correctness, kernels, models, rivals, speed, suite, targets
from server.bench.gpu.options import PARTS, QUICK, parse
from server.bench.gpu.result import default_file
from server.bench.session import Row
from tests import checkpoints
from tests.fakes import fake_model
from tests.forked import ROOT
from tests.loaders.cuda.test_graph_runner import specified
from tests.recorded_graphs import RecordedGraphs

REHEARSAL = ["--device", "cpu", "--quick"]
PATIENT = [*REHEARSAL, "--seconds", "1800"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a complete dry run in one precision."""
    file = tmp_path_factory.mktemp("out") / "deep" / "gpu.json"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        patched.setattr(check, "_TESTS", 900.0)  # a busy host is slow
        assert check.main([*PATIENT, "--precisions", "fp32", "--out", str(file)]) == 0
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def rows(found: dict[str, Any], engine: str) -> list[tuple[str, int]]:
    return [(row["model"], row["batch"]) for row in found["rows"] if row["engine"] == engine]


@pytest.mark.slow
def test_all_parts_find_something(found: dict[str, Any]) -> None:
    assert (found["complete"], found["failures"]) == (True, [])
    assert found["tests"][0]["failed"] == []
    assert set(found["tests"][0]["counts"]) == {"skipped"}
    (one,) = found["correctness"]
    assert (one["isolated"], one["same_as_generate"], one["captured"]) == (True, 1.0, False)
    assert one["not_captured_because"] == "there is no GPU"
    both = [("tiny", 1), ("tiny", 3), ("tiny-xl", 2)]
    assert rows(found, "bitdial") == rows(found, rivals.GENERATE) == both
    assert rows(found, speed.STEADY) == [("tiny", 1), ("tiny", 4)]
    assert rows(found, rivals.CONTINUOUS) == [("tiny", 3)]
    assert rows(found, rivals.STATIC) == [("tiny", 1)]
    assert [one["what"] for one in found["skipped"]] == ["kernels fp32"]
    assert [one["offered"] for one in found["http"]] == [1, 3]
    assert not any(one["errors"] for one in found["http"])
    assert found["stats"][0]["memory"]["weights_bytes"] > 0


@pytest.mark.slow
def test_figures_are_compared_with_those_of_the_same_size(found: dict[str, Any]) -> None:
    ours = {(r["model"], r["batch"]): r for r in found["rows"] if r["engine"] == "bitdial"}
    for row in found["rows"]:
        if row["engine"] in (rivals.GENERATE, rivals.CONTINUOUS, rivals.STATIC):
            rate = ours[row["model"], row["batch"]]["decode_tokens_per_second"]
            assert row["bitdial_ratio"] == pytest.approx(rate / row["decode_tokens_per_second"])
    assert all(row["floor"]["share"] > 0 for row in ours.values())


@pytest.mark.slow
def test_the_targets_are_judged_by_the_figures(found: dict[str, Any]) -> None:
    rate = next(r for r in found["rows"] if (r["engine"], r["batch"]) == ("bitdial", 1))
    (judged,) = (one for one in found["targets"] if "tokens a second" in one["target"])
    assert judged["figure"] == rate["decode_tokens_per_second"]
    assert judged["reached"] == (judged["figure"] >= 1500)


def test_the_command_reports_a_missing_card(forked_processes: None) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_check")], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_gpu_check_needs_none_of_the_servers_packages() -> None:
    """A GPU host may have torch and transformers but not the server's packages."""
    script = (
        "import sys, server.bench.gpu.check\n"
        "print([n for n in ('fastapi', 'uvicorn', 'pydantic', 'httpx', 'starlette') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_failure_is_reported_and_the_other_parts_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = correctness.check

    def broken(precision: str, spec: Any) -> correctness.Correctness:
        if precision == "fp32":
            raise RuntimeError("CUDA error: something\nin detail")
        return real(precision, spec)

    monkeypatch.setattr(correctness, "check", broken)
    file = tmp_path / "gpu.json"
    arguments = ["--precisions", "fp32,bf16", "--parts", "correctness", "--out", str(file)]
    assert check.main([*REHEARSAL, *arguments]) == 1
    document = json.loads(file.read_text())
    assert document["failures"] == ["correctness fp32: RuntimeError: CUDA error: something"]
    assert [one["precision"] for one in document["correctness"]] == ["bf16"]


def test_a_part_that_cannot_start_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(check.Check, "_xl", full)
    monkeypatch.setattr(check.Check, "_steady", lambda self: self.result.note("steady", "done"))
    file = tmp_path / "gpu.json"
    assert check.main([*REHEARSAL, "--parts", "xl,steady", "--out", str(file)]) == 1
    document = json.loads(file.read_text())
    assert document["failures"] == ["xl: OSError: no space left on device"]
    assert (document["steady"], document["complete"]) == (["done"], True)


def verdict(**values: Any) -> correctness.Correctness:
    fine: dict[str, Any] = {
        "precision": "fp32", "captured": True, "not_captured_because": None, "equals_eager": True,
        "isolated": True, "farthest": 0.0, "same_as_generate": 1.0, "seconds": 1.0,
        "memory": correctness.Memory(10**9, 10**9, 10**9, 0),
    }  # fmt: skip
    return correctness.Correctness(**{**fine, **values})


def test_failures_of_correctness() -> None:
    assert verdict().faults(on_card=True) == []
    assert verdict(captured=False).faults(on_card=False) == []
    faults: list[tuple[dict[str, Any], str]] = [
        ({"captured": False, "not_captured_because": "it would not"}, "it would not"),
        ({"equals_eager": False}, "differs from the same step launched"),
        ({"isolated": False, "farthest": 0.5}, "by up to 0.5"),
        ({"same_as_generate": 0.5}, "only 50%"),
        ({"memory": correctness.Memory(10**9, 10**9, 2 * 10**9, 0)}, "tells 1000000000"),
        ({"memory": correctness.Memory(10**9, 10**9, 10**9, 10**9)}, "still taken"),
    ]
    for wrong, said in faults:
        (fault,) = verdict(**wrong).faults(on_card=True)
        assert fault.startswith("fp32: ")
        assert said in fault
    assert "equal to launched: NO" in verdict(equals_eager=False).line()


def test_the_check_of_steps_detects_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner whose rows affect each other, and one whose replays differ from its launched steps."""
    model = checkpoints.gpt2()
    spec = specified(model, slots=4, context=128)
    runner = GraphRunner(model, spec, RecordedGraphs())
    assert correctness._isolated(runner) == (True, 0.0)
    assert correctness._same_as_generate(runner) == 1.0
    assert runner.captured
    for key, replay in dict(runner.captured_steps).items():
        if key[0] == "decode":

            def off(replay: Any = replay) -> None:
                replay()
                runner._logits[0] += 1e-3

            runner._graphs._replays[key] = off
    assert not correctness._equals_eager(runner, spec)
    plain = GraphRunner(model, spec, None, why_not="wanted so")
    decode = plain.decode

    def leak(slots: Any, ids: Any) -> torch.Tensor:
        return decode(slots, ids) + 1e-3 * len(slots)

    monkeypatch.setattr(plain, "decode", leak)
    isolated, farthest = correctness._isolated(plain)
    assert not isolated
    assert farthest == pytest.approx(3e-3, rel=0.01)


def test_the_step_that_serves_so_many_rows_and_what_it_costs() -> None:
    model = checkpoints.gpt2()
    runner = GraphRunner(model, specified(model, slots=4, steady=False), RecordedGraphs())
    assert kernels.captured_step(runner, 3, 100) is None
    runner.prefill(0, [1])
    step = kernels.captured_step(runner, 3, 100)
    assert step is not None
    assert (step.rows, step.columns) == (4, 256)
    assert kernels.replay_ms(step.replay) is None
    one = torch.zeros(2)

    def two_operations() -> None:
        one.add_(1.0)
        one.mul_(2.0)

    cost = kernels.kernel_cost(two_operations, "cpu")
    assert cost.kernels >= 2
    assert cost.kernel_ms > 0


def test_the_result_of_the_kernels_part_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's runner under the check, with recorded graphs."""
    model = checkpoints.gpt2()
    spec = replace(specified(model, slots=3), batch_invariant=False)

    def load(precision: str, _: Any) -> LoadedModel:
        loaded = fake_model(precision)
        loaded.runner = GraphRunner(model, spec, RecordedGraphs())
        return loaded

    monkeypatch.setattr("loaders.load", load)
    monkeypatch.setattr(check, "another_process", ThreadPoolExecutor)
    monkeypatch.setattr(speed, "replay_ms", lambda replay: replay() or 0.5)
    file = tmp_path / "gpu.json"
    arguments = ["--precisions", "fp32", "--parts", "speed,kernels", "--out", str(file)]
    assert check.main([*REHEARSAL, *arguments]) == 0
    document = json.loads(file.read_text())
    (loaded,) = document["loaded"]
    assert loaded["runner"]["captured"]
    assert loaded["working_bytes"] > 0
    assert [step["batch"] for step in loaded["steps"]] == [1, 3]
    for step, cost in zip(loaded["steps"], document["kernels"], strict=True):
        assert step["share_of_replay"] == pytest.approx(0.5 / step["end_to_end_ms"])
        assert cost["kernels"] > 10
        assert cost["share_of_kernels"] == pytest.approx(cost["kernel_ms"] / step["end_to_end_ms"])
    shares = [one["figure"] for one in document["targets"] if "kernels" in one["target"]]
    assert shares == [cost["share_of_kernels"] for cost in document["kernels"]]


def row(engine: str, batch: int, rate: float, ratio: float | None = None) -> tuple[str, Row]:
    return "gpt2", Row("nf4", batch, engine, Figures(1.0, rate, 0.0, 1.0, 1.0, 1.0), ratio=ratio)


def test_targets() -> None:
    measured = [
        row("bitdial", 1, 2000.0),
        row("bitdial", 64, 60000.0),
        row(rivals.GENERATE, 1, 250.0, 8.0),
        row(rivals.GENERATE, 64, 250.0, 2.0),
        row(rivals.CONTINUOUS, 64, 30000.0, 2.0),
        row(rivals.STATIC, 1, 1000.0, 2.0),
    ]
    step = {"model": "gpt2", "precision": "nf4", "batch": 8, "share_of_kernels": 0.7}
    judged = targets.judged(measured, [step, {"kernels": 0}], "gpt2")
    assert [(one["batch"], one["figure"], one["reached"]) for one in judged] == [
        (1, 8.0, True), (64, 2.0, False), (8, 0.7, True), (1, 2000.0, True),
    ]  # fmt: skip
    assert "NOT REACHED" in targets.line(judged[1])


def test_a_rival_that_will_not_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("not with this version\nof anything")

    monkeypatch.setattr(rivals, "measure", refuse)
    file = tmp_path / "gpu.json"
    arguments = ["--precisions", "fp32", "--parts", "continuous,compile", "--out", str(file)]
    assert check.main([*REHEARSAL, *arguments]) == 0
    whys = [one["why"] for one in json.loads(file.read_text())["skipped"]]
    assert whys == ["ValueError: not with this version"] * 2


def test_the_output_of_pytest_is_parsed() -> None:
    output = "..F\nFAILED tests/gpu/test_steps.py::test_x - assert 1\n1 failed, 2 passed, 3 skipped in 0.1s\n"
    read = suite.read(1, output)
    assert read.counts == {"failed": 1, "passed": 2, "skipped": 3}
    assert read.faults() == ["tests/gpu/test_steps.py::test_x - assert 1"]
    assert suite.read(None, "..").faults() == ["the tests did not end in time"]
    assert suite.read(5, "no tests ran").faults() == []


@pytest.mark.parametrize("own", [False, True])
def test_a_model_is_made_with_a_tokenizer_that_knows_every_token(tmp_path: Path, own: bool) -> None:
    if own:
        models.stand_in(QUICK.small.vocabulary).save_pretrained(tmp_path / "own")
    folder = models.make(QUICK.small, tmp_path / "made", "cpu", tmp_path / "own" if own else None)
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.vocabulary, checkpoint.context_length, *checkpoint.eos_ids) == (320, 256, 319)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Ein Satz, naïve “quotes” und 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(tokenizer.decode([id_]) for id_ in range(320))
    assert len(models.stand_in(50257)) == 50257


def test_options() -> None:
    options = parse([])
    assert (options.parts, options.device, options.sizes.batches) == (PARTS, "cuda", (1, 8, 32, 64))
    assert options.seconds <= 480
    assert parse(["--parts", "tests,http"]).parts == ("tests", "http")
    with pytest.raises(SystemExit):
        parse(["--precisions", "int3"])
    assert default_file("NVIDIA H200").name.startswith("gpu-nvidia-h200-")
