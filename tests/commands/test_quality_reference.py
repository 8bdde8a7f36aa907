"""``bitdial quality --reference``: saved checkpoints measured against the model that they were made from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loaders
from server.__main__ import main
from tests import checkpoints

WORDS = "the other theatre, and in another one, the café again\n" * 20
TIMES = {"seconds", "reference_seconds"}
Measure = Callable[..., list[dict[str, Any]]]


def save_with(tokenizer: dict[str, Any], folder: Path) -> None:
    checkpoints.save(checkpoints.llama(), folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, four precisions of it, what is not comparable with it, and a text."""
    folder = tmp_path_factory.mktemp("models")
    original = str(checkpoints.save(checkpoints.llama(), folder / "original"))
    for method in ("nf4", "int8", "dynamic-int8", "static-int8"):
        text = str(checkpoints.calibration_text(folder))
        arguments = ["--method", method, "--out", str(folder / f"my-{method}"), "--calibration", text]
        assert main(["quantize", "--model", original, *arguments]) == 0
    checkpoints.save(checkpoints.llama(seed=1), folder / "tuned")
    checkpoints.save(checkpoints.llama(context=128), folder / "short")
    wide = checkpoints.llama()
    wide.resize_token_embeddings(checkpoints.VOCABULARY + 64)
    checkpoints.save(wide, folder / "wide")
    other = json.loads((Path(original) / "tokenizer.json").read_text())
    other["model"]["merges"].reverse()
    save_with(other, folder / "merging")
    other["model"]["vocab"]["thé"] = other["model"]["vocab"].pop("the")
    other["model"]["merges"].remove(["th", "e"])
    other["model"]["merges"].remove(["Ġ", "the"])
    save_with(other, folder / "renamed")
    (folder / "text.txt").write_text(WORDS, encoding="utf-8")
    return folder


@pytest.fixture
def measure(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Measure:
    """The rows of the command's JSON, without times."""
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        options = ["--text", "text.txt", "--window", "64", "--prompts", "2", "--layers"]
        assert main(["quality", *arguments, *options]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["precisions"]
        return [{key: value for key, value in row.items() if key not in TIMES} for row in found]

    return call


@pytest.mark.parametrize("precision", ["nf4", "dynamic-int8", "static-int8"])
def test_a_saved_checkpoint_has_the_figures_of_its_precision(precision: str, measure: Measure) -> None:
    """bitdial's own forms and bitsandbytes'; also each layer's error, which needs the original weights."""
    if not loaders.availability(precision, "cpu").ok:
        pytest.skip("not on this host")
    given = ["--calibration", "calibration.txt"]
    reference, saved = measure("--model", f"my-{precision}", "--reference", "original")
    full, direct = measure("--model", "original", "--precisions", f"{precision},fp32", *given)
    assert reference == full
    assert (saved.pop("model"), direct.pop("model")) == (f"my-{precision}", "original")
    assert saved == direct
    assert saved["mean_kl"] > 0
    assert all(layer["relative_error"] is not None for layer in saved["layers"])


def test_several_models_have_rows_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    capsys.readouterr()
    out = tmp_path / "out.json"
    arguments = ["--models", "my-nf4,b=my-int8,tuned,original", "--reference", "original", "--json", str(out)]
    arguments += ["--text", "text.txt", "--window", "64", "--prompts", "0", "--precisions", "fp32,bf16"]
    assert main(["quality", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = ["original:fp32", "my-nf4:nf4", "b:int8", "tuned:fp32", "tuned:bf16", "original:bf16"]
    assert lines[0].startswith("my-nf4, b, tuned, original against fp32 of original on text.txt: ")
    assert [line.split()[0] for line in lines[2:9]] == ["model:precision", *expected]
    found = json.loads(out.read_text())
    assert found == json.loads(lines[-1])
    assert (found["model"], found["reference"]) == (None, "original")
    assert [f"{row['model']}:{row['precision']}" for row in found["precisions"]] == expected
    kl = {f"{row['model']}:{row['precision']}": row["mean_kl"] for row in found["precisions"]}
    assert kl["original:fp32"] == 0 < kl["original:bf16"] < kl["my-nf4:nf4"] < kl["tuned:fp32"]


def test_layers_of_another_shape_have_no_error(measure: Measure, folder: Path) -> None:
    """Of a narrower model, whose distributions can still be compared with the original's."""
    config = checkpoints.llama().config
    config.intermediate_size = 64
    narrow = checkpoints.save(type(checkpoints.llama())(config), folder / "narrow")
    assert main(["quantize", "--model", str(narrow), "--method", "nf4", "--out", "my-narrow"]) == 0
    _, row = measure("--model", "my-narrow", "--reference", "original")
    unknown = {layer["name"] for layer in row["layers"] if layer["relative_error"] is None}
    assert {name.rpartition(".")[2] for name in unknown} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (
            2,
            "--model my-nf4",
            "my-nf4 is saved in nf4 and has no fp32 to be measured against: name",
        ),
        (
            2,
            "--model original --reference my-nf4",
            "--reference: my-nf4 is itself saved in nf4; name",
        ),
        (2, "--model my-nf4 --reference original --precisions int4", "my-nf4 is saved in nf4; for int4 name"),
        (2, "--models my-nf4", "--models needs --reference: "),
        (2, "--models my-nf4 --model my-int8 --reference original", "--model is of one model"),
        (2, "--models my-nf4 --revision main --reference original", "in --models write owner/name@revision"),
        (2, "--models my-nf4,./my-nf4 --reference original", "--models: two models are named my-nf4"),
        (2, "--models my-nf4,, --reference original", "--models: it must be models by comma"),
        (2, "--model my-nf4 --reference owner/name@", "--reference: after @ it has no revision"),
        (1, "--model my-nf4 --reference ./none", "--reference: the model './none' is neither"),
        (1, "--model ./none --reference original", "the model './none' is neither"),
        (1, "--model my-nf4 --reference wide", "their vocabularies have 320 and 384 tokens"),
        (
            1,
            "--model my-nf4 --reference renamed",
            "my-nf4 can't be measured against renamed: their tokenizers",
        ),
        (
            1,
            "--models a=my-nf4 --reference short",
            "a has a context of 256 tokens, short of 128: give",
        ),
        (1, "--model short --reference original --window 200", "short has a context of 128 tokens, original"),
        (1, "--model my-nf4 --reference original --text none.txt", "none.txt is not a file"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    code: int,
    arguments: str,
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loaders, "load", None)
    capsys.readouterr()
    assert main(["quality", "--text", "text.txt", *arguments.split()]) == code
    said = capsys.readouterr()
    assert said.err.startswith("bitdial quality: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_windows_that_fit_both_contexts_are_measured(measure: Measure) -> None:
    reference, row = measure("--model", "short", "--reference", "original", "--precisions", "fp32")
    assert (reference["model"], row["model"], row["window"]) == ("original", "short", 64)
    assert row["top1_agreement"] == 1
