"""``bitdial quality``: its table, its line of JSON, its warning, and its errors."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from server.__main__ import main
from server.host import memory
from tests import checkpoints

WORDS = "the other theatre, and in another one, the café again\n" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("model")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return str(path)


def test_table_layers_and_json(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--precisions", "nf4,fp32", "--window", "128", "--batch", "2", "--layers"]
    arguments += ["--prompts", "3"]
    assert main(["quality", "--model", model, "--text", text, "--json", str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "windows of 128 at stride 64, 2 at a time" in lines[0]
    head, full, nf4 = (line.split() for line in lines[2:5])
    assert (head[0], full[0], nf4[0]) == ("precision", "fp32", "nf4")
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    one, other = found["precisions"]
    assert (one["precision"], one["perplexity_ratio"], one["mean_kl"]) == ("fp32", 1.0, 0.0)
    assert (other["precision"], other["greedy"]["prompts"], other["window"], other["batch"]) == (
        "nf4",
        3,
        128,
        2,
    )
    assert other["mean_kl"] > 0
    assert f"{other['perplexity_ratio']:.5f}" in nf4
    assert [layer["name"] for layer in other["layers"]][-1] == "lm_head"
    assert other["warning"] is None
    row = next(line for line in lines if line.startswith("transformer.h.0.attn.c_attn") and "4-bit" in line)
    assert row.split()[1:7] == ["Conv1D", "NativeLinear", "4-bit", "192", "×", "64"] or "Linear4bit" in row
    of_head = next(line for line in lines if line.startswith("lm_head") and "int8" in line)
    assert "320 × 64" in " ".join(of_head.split())


def test_groups_that_do_not_fit_together_give_the_same_figures(
    model: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["quality", "--model", model, "--text", text, "--precisions", "bf16,nf4", "--prompts", "2"]
    assert main(arguments) == 0
    together = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert main(arguments) == 0
    apart = json.loads(capsys.readouterr().out.splitlines()[-1])
    for found in (*together["precisions"], *apart["precisions"]):
        del found["seconds"], found["reference_seconds"]
    assert together == apart


def test_a_model_that_is_hardly_quantized_is_warned_of(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPT2Config(vocab_size=4000, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    folder = checkpoints.save(GPT2LMHeadModel(config), tmp_path / "wide")
    arguments = ["--model", str(folder), "--text", text, "--precisions", "int8", "--prompts", "0"]
    assert main(["quality", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "\nWARNING: int8 has quantized only 16% of this model's linear weights" in printed
    assert "only 16%" in json.loads(printed.splitlines()[-1])["precisions"][0]["warning"]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"\xff\xfe", [], "t.txt is not UTF-8 text"),
        (b"", [], "has 0 tokens"),
        (None, [], "t.txt is not a file"),
        (b"the cat", ["--window", "9999"], "a window has from 2 to 256 tokens"),
        (b"the cat", ["--json", "/dev/full"], "--json: No space left on device"),
    ],
)
def test_an_error_is_one_line(
    model: str,
    content: bytes | None,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    wanted = ["--model", model, "--text", str(path), "--precisions", "bf16", *arguments]
    assert main(["quality", *wanted]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bitdial quality: ")
    assert message in last
