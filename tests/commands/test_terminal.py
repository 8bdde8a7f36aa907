"""Terminal output, and how the environment and a pipe change it."""

import errno
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import loaders
from server.__main__ import main
from server.bench import table
from server.bench.figures import Figures
from server.bench.session import Row
from server.commands import bench, generate, quality
from server.commands.command_line import parse
from server.host import cache
from server.settings.server import Settings
from server.tables import Table
from tests import checkpoints
from tests.forked import bitdial, completed


class Screen(io.StringIO):
    """A standard output that is a terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Screen()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("models") / "tiny")


def test_a_terminal_gets_the_table_within_its_width_and_no_json(
    screen: Screen, folder: Path, tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("the other theatre, and in another one, the café again\n" * 10, encoding="utf-8")
    arguments = ["--precisions", "nf4", "--window", "64", "--prompts", "0", "--json", str(out)]
    with redirect_stdout(screen):
        assert main(["quality", "--model", str(folder), "--text", str(text), *arguments]) == 0
    shown = screen.getvalue().splitlines()
    assert max(map(len, shown)) <= 80
    assert sum(line.startswith("nf4") for line in shown) >= 2, "the columns that don't fit stand below"
    assert not any(line.startswith("{") for line in shown)
    assert "--json FILE" in shown[-1]
    assert json.loads(out.read_text())["precisions"][0]["precision"] == "nf4"


def a_row() -> Row:
    figures = Figures(
        prefill_tokens_per_second=100.0,
        decode_tokens_per_second=90.0,
        spread=0.01,
        ttft_ms=5.0,
        inter_token_p50_ms=1.0,
        inter_token_p99_ms=2.0,
        decode_rates=[90.0],
    )
    return Row("dynamic-int8", 16, "llama.cpp Q8_0", figures, weights_bytes=1_000_000, ratio=1.5)


def test_a_wide_table_continues_below_the_first_columns() -> None:
    narrow = Table(table.COLUMNS, keys=3, width=80)
    first, row = narrow.heading().splitlines(), narrow.line(a_row())
    rest = narrow.rest([a_row(), a_row()]).splitlines()
    assert max(map(len, [*first, row, *rest])) <= 80
    names = " ".join([first[0], *rest])
    assert all(column.name in names for column in table.COLUMNS)
    assert sum(line.startswith("dynamic-int8") for line in rest) % 2 == 0
    wide = Table(table.COLUMNS, keys=3, width=None)
    assert (wide.heading(), wide.line(a_row())) == (table.WHOLE.heading(), table.WHOLE.line(a_row()))
    assert wide.rest([a_row()]) == ""


def test_a_commands_own_options_are_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "TEMPERATURE", "TOP_K", "PROMPT", "MAX_NEW_TOKENS", "TOKENS", "TEXT", "WINDOW"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("THREADS", "3")
    monkeypatch.setenv("PRECISION", "nf4")
    plain = parse(generate.Options, "generate", ["x"])
    assert (plain.seed, plain.temperature, plain.top_k, plain.max_new_tokens) == (0, None, None, 64)
    assert (plain.threads, plain.precision) == (3, "nf4")
    assert (parse(bench.Options, "bench", []).prompt, parse(bench.Options, "bench", []).tokens) == (32, 48)
    assert parse(quality.Options, "quality", []).text is None


def test_a_prompt_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", str(folder), "--max-new-tokens", "3"]
    assert main(["generate", "abc", *options]) == 0
    given = capsys.readouterr().out
    assert given.startswith("abc")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    assert main(["generate", *options]) == 0
    assert capsys.readouterr().out == given


@pytest.mark.parametrize(("given", "reason"), [(b"", "is empty"), (b"\xff", "is not UTF-8")])
def test_a_prompt_that_cannot_be_read(
    given: bytes, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(["generate", "-"]) == 2
    assert f"standard input {reason}" in capsys.readouterr().err


def test_all_precisions_are_those_that_this_host_can_run() -> None:
    settings = Settings(precisions="all", device="cpu", precision="nf4")
    assert settings.first_precisions()[0] == "nf4"
    assert set(settings.first_precisions()) == set(loaders.direct("cpu"))
    assert set(settings.required_precisions()) == set(loaders.direct("cpu"))


def test_ctrl_c_in_a_report_says_that_it_is_kept() -> None:
    script = """
import builtins, os, signal, sys
real = builtins.__import__

def interrupted(name, *rest, **options):
    if name == "server.report.measuring" and "job" in (rest[2] or ()):
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **options)

builtins.__import__ = interrupted
from server.__main__ import main

sys.exit(main(["report"]))
"""
    done = completed(script)
    assert done.returncode == 130
    assert "interrupted; what was measured is kept" in done.stderr


@pytest.mark.parametrize("command", [["report", "--out"], ["quality", "--json"], ["bench", "--json"]])
def test_a_full_disk_is_found_out_before_anything_is_measured(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "TemporaryFile", full)
    assert main([*command, str(tmp_path / "new" / "out")]) == 2
    err = capsys.readouterr().err
    assert re.search(r"'out' can't be written there: No space left on device\n$", err)
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_the_wrong_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["report", "--out", str(file)]) == 2
    assert "'file' is no folder" in capsys.readouterr().err
    assert main(["quality", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_level_that_is_none_is_refused() -> None:
    done = bitdial("serve", "--log-level", "loud")
    assert done.returncode == 2
    assert "--log-level (or LOG_LEVEL)" in done.stderr
