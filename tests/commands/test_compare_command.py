"""``bitdial compare``: its table, its columns, its errors."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.__main__ import main
from server.commands.side_by_side import MARK, columns, side_by_side, wrapped
from server.tables import aligned
from tests import checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("model")))


def test_table_and_columns(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    out = tmp_path / "out.json"
    options = ["--precisions", "nf4,fp32", "--max-new-tokens", "20", "--json", str(out)]
    assert main(["compare", "the other theatre", "--model", model, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["precision", "fp32", "nf4"]
    saved = json.loads(out.read_text())
    assert (saved["reference"], list(saved["precisions"])) == ("fp32", ["fp32", "nf4"])
    full, nf4 = saved["precisions"].values()
    assert full["first_divergence"] is None
    assert nf4["mean_kl"] > 0
    assert nf4["first_divergence"] is not None  # random weights: four bits are enough to change a token
    assert f"nf4 differs from token {nf4['first_divergence']} on ({MARK}):" in lines
    assert lines[2].split()[-1] == str(nf4["first_divergence"])
    beside = [line for line in lines if " │ " in line or line.endswith(" │")]
    assert beside[0].split() == ["fp32", "│", "nf4"]
    assert all(columns(line) <= 90 for line in beside)
    assert sum(line.count(MARK) for line in beside) == 2


def test_equal_tokens_are_reported(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--precisions", "fp32", "--reference", "fp16", "--max-new-tokens", "3"]
    assert main(["compare", "the cat", "--model", model, *options]) == 0
    printed = capsys.readouterr().out
    assert "fp16 continues, 3 tokens:" in printed
    assert "fp32 continues with the same tokens." in printed


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["a", "--max-new-tokens", "256"], 2, "exceed the model's context of 256"),
        (["a", "--precisions", "int3"], 2, "unknown precision 'int3'"),
        (["a", "--reference", "x"], 2, "unknown precision 'x'"),
        (["a", "--device", "cuda", "--precisions", "dynamic-int8"], 2, "can't be served here"),
        (["a", "--precisions", "fp32", "--json", "/dev/null/x"], 2, "'x' can't be written there"),
        (["a", "--precisions", "fp32", "--json", "/dev/full"], 1, "--json: No space left on device"),
    ],
)
def test_an_error_is_one_line(
    model: str, arguments: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--model", model, *arguments]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bitdial compare: ")
    assert expected in last


def test_columns_part_at_the_mark() -> None:
    found = side_by_side(("a", "b"), ("one two three four", "one two thirty\n4"), 40)
    assert found == [
        "a                  │ b",
        "────────────────── │ ──────────────────",
        "one two th▶ree     │ one two th▶irty",
        "four               │ 4",
    ]


def test_control_characters_are_not_printed() -> None:
    found = "".join(side_by_side(("a", "b"), ("x\x1b[2J\ry", "x\x07\u202ey"), 60))
    assert not {"\x1b", "\r", "\x07", "\u202e"} & set(found)


@given(text=st.text(max_size=120), width=st.integers(2, 40))
def test_lines_fit_whatever_the_script(text: str, width: int) -> None:
    lines = list(wrapped(text, width))
    assert all(columns(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wide_characters_take_two_columns() -> None:
    assert list(wrapped("東京の雨", 5)) == ["東京", "の雨"]
    (row,) = side_by_side(("a", "b"), ("東京", "東京の"), 40)[2:]
    assert row == f"東京{MARK}{' ' * 13} │ 東京{MARK}の"


def test_equal_texts_are_marked_at_their_end() -> None:
    assert side_by_side(("a", "b"), ("same", "same"), 40)[2:] == [f"same{MARK}{' ' * 13} │ same{MARK}"]


def test_a_wide_table_continues_below() -> None:
    cells = [["name", "aaaa", "bb", "cccccc"], ["x", "1", "22", "3"]]
    assert aligned(cells, 14) == [
        "name  aaaa  bb",
        "x        1  22",
        "",
        "name  cccccc",
        "x          3",
    ]
    assert aligned(cells) == ["name  aaaa  bb  cccccc", "x        1  22       3"]
    assert max(map(len, aligned(cells, 1))) == len("name  cccccc")  # the first column and the widest
