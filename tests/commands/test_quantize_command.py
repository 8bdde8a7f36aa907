"""``bitdial quantize``: a checkpoint that can be served, the cache, and one line for every mistake."""

import signal
from pathlib import Path

import pytest

from loaders import kernels
from loaders.base import Availability
from loaders.precisions import litert
from server.__main__ import main
from tests import checkpoints
from tests.forked import running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("m") / "tiny"))


def test_a_saved_checkpoint_continues_as_the_original_does(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small")
    assert main(["quantize", "--model", model, "--method", "dynamic-int8", "--out", out]) == 0
    said = capsys.readouterr().out
    assert f"dynamic-int8 is saved in {out}" in said
    assert f"bitdial serve --model {out}" in said
    texts = []
    for arguments in (["--model", out], ["--model", model, "--precision", "dynamic-int8"]):
        assert main(["generate", "the rain", "--max-new-tokens", "8", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_saved_checkpoint_has_one_precision(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small")
    assert main(["quantize", "--model", model, "--method", "nf4", "--out", out]) == 0
    capsys.readouterr()
    assert main(["precisions", "--model", out]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[3:]}
    assert lines["nf4"].endswith("yes")
    assert "no: small is saved in nf4; for other precisions name the model" in lines["fp32"]
    for command in (["generate", "a", "--precision", "fp32"], ["serve", "--precisions", "int8"]):
        assert main([*command, "--model", out]) == 2
        assert "small is saved in nf4; for " in capsys.readouterr().err
    assert main(["quantize", "--model", out, "--method", "nf4", "--out", str(tmp_path / "again")]) == 1
    assert "small is saved in nf4 already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--method is missing: int8, nf4"),
        (["--method", "int3"], "unknown precision 'int3'"),
        (
            ["--method", "fp32"],
            "fp32 has no files to make; these have: int8, nf4, fp4, dynamic-int8, static-int8",
        ),
        (["--method", "int8"], "int8 is made while it is loaded and not cached; --out FOLDER saves it"),
        (["--method", "int8", "--out", "."], "'.' exists|exists"),
        (["--method", "int8", "--out", "o", "--calibration", "missing.txt"], "'missing.txt' is not a file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert main(["quantize", *arguments]) == 2
    said = capsys.readouterr().err
    assert any(one in said for one in message.split("|"))
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tmp_path / "none"), "--method", "int8", "--out", str(tmp_path / "out")]
    assert main(["quantize", *arguments]) == 1
    assert "bitdial quantize: the model" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


SLOW = """
import sys, time
from loaders.precisions import dynamic_int8

def make(precision, spec, folder, progress):
    (folder / "quantized.safetensors").write_text("half")
    print("begun", flush=True)
    time.sleep(600)

dynamic_int8.make = make
from server.__main__ import main

sys.exit(main(["quantize", "--model", sys.argv[1], "--method", "dynamic-int8", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_nothing_is_left(model: str, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "small"
    with running(SLOW, model, str(out)) as process:
        assert process.stdout.readline() == "begun\n"
        assert [path.name for path in tmp_path.iterdir()] == ["small.partial"]
        process.send_signal(number)
        assert process.wait() == 130
        assert process.stderr().endswith("bitdial quantize: interrupted\n")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))
def test_a_trained_checkpoint_is_converted_and_what_it_loses_is_said(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a converter that writes a file of its own."""
    text = str(checkpoints.calibration_text(tmp_path))
    monkeypatch.setattr(litert, "availability", lambda *_: Availability())
    monkeypatch.setattr(litert, "make", lambda _, spec, folder, progress: (folder / "model.tflite").touch())
    for granularity, loses in (("group", True), ("channel", False)):
        trained, out = str(tmp_path / granularity), str(tmp_path / f"{granularity}.tflite")
        options = ["--steps", "1", "--granularity", granularity, "--calibration", text]
        assert main(["quantize", "--model", model, "--method", "qat-int8", *options, "--out", trained]) == 0
        capsys.readouterr()
        assert main(["quantize", "--model", trained, "--method", "litert-int8", "--out", out]) == 0
        assert ("its weights were rounded again: qat-int8 was trained" in capsys.readouterr().out) == loses
        assert main(["quantize", "--model", trained, "--method", "litert-int8"]) == 2
        assert "--out is missing: what is made of a saved checkpoint" in capsys.readouterr().err
        assert main(["quantize", "--model", trained, "--method", "nf4", "--out", out + "x"]) == 1
        assert f"{granularity} is saved in qat-int8 already" in capsys.readouterr().err
