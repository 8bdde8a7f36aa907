"""``--help``, and errors for precisions that this host can't run."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pydantic_settings import BaseSettings

import loaders
from loaders import checkpoint
from loaders.base import Availability
from loaders.errors import ModelNotFound
from server.__main__ import main
from server.commands import (
    COMMANDS,
    bench,
    cache,
    chat,
    compare,
    explain,
    generate,
    plan,
    precisions,
    quality,
    quantize,
    report,
    serve,
)

OPTIONS: dict[str, type[BaseSettings]] = {
    "serve": serve.Options,
    "chat": chat.Options,
    "generate": generate.Options,
    "precisions": precisions.Options,
    "quantize": quantize.Options,
    "cache": cache.Options,
    "compare": compare.Options,
    "report": report.Options,
    "quality": quality.Options,
    "explain": explain.Options,
    "bench": bench.Options,
    "plan": plan.Options,
}


def help_of(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    ended = 0
    try:
        ended = main([*arguments, "--help"])
    except SystemExit as end:
        ended = int(end.code or 0)
    assert ended == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_written_for_people(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of([command] if command else [], capsys)
    assert not re.search(r"SecretStr|\btuple|\bNone\b|\bnull\b|\{.*\}|\b(str|int|float|bool)\b|\(\)", text)
    if columns >= 80:
        assert max(map(len, text.splitlines())) <= min(columns, 100)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_setting_has_its_option_and_its_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of([command], capsys).split())
    for name, field in OPTIONS[command].model_fields.items():
        if name in ("prompt", "json_lines"):
            continue
        dashed = name.replace("_", "-")
        assert re.search(rf"--(\[no-\])?{dashed}[, ]", text), name
        assert (field.description or "?") in re.sub(r"(?<=\w)- (?=\w)", "-", text), name


def test_all_commands_but_completion_have_options() -> None:
    assert OPTIONS.keys() == COMMANDS.keys() - {"completion"}


def test_help_and_version_do_not_wait_for_pytorch() -> None:
    script = (
        "import sys; from server.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_summary_has_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([], capsys)
    for code in (0, 1, 2, 70, 130):
        assert re.search(rf"^  {code} ", text, re.M)


def test_defaults_are_plain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(help_of(["serve"], capsys).split())
    for shown in ("[default: 8080]", "[default: all cores]", "[default: 300]", "[default: no]"):
        assert shown in text


def test_the_summary_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of([], capsys)
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", text, re.M)


@pytest.fixture
def no_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without the library for nf4, and without any model."""
    real = loaders.availability

    def availability(precision: str, device: Any) -> Availability:
        if precision == "nf4":
            return Availability("its library is missing", "pip install it")
        return real(precision, device)

    def nothing(*_: object) -> NoReturn:
        raise ModelNotFound("the model was looked for")

    monkeypatch.setattr(loaders, "availability", availability)
    monkeypatch.setattr(checkpoint, "open_checkpoint", nothing)


@pytest.mark.usefixtures("no_nf4")
@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--precision", "nf4"],
        ["serve", "--precisions", "fp32,4bit"],
        ["generate", "abc", "--precision", "nf4"],
    ],
)
def test_a_named_precision_that_cannot_run_ends_the_start(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"bitdial {arguments[0]}: nf4 can't be served here: its library is missing "
        "(mend it with: pip install it)"
    ]


@pytest.mark.usefixtures("no_nf4")
def test_so_does_one_that_the_environment_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECISIONS", "nf4")
    assert main(["serve", "--device", "cpu"]) == 2
    assert "pip install it" in capsys.readouterr().err


@pytest.mark.usefixtures("no_nf4")
def test_the_usual_precisions_need_not_all_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "bitdial serve: the model was looked for\n"


@pytest.mark.parametrize("address", ["collector:4318", "ftp://collector", "http://", "http://[", "4318"])
def test_a_collector_has_an_http_address(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--otlp-endpoint", address]) == 2
    assert "--otlp-endpoint (or OTLP_ENDPOINT): it must be an address" in capsys.readouterr().err


def test_each_invalid_value_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--precisions", "int3,int2", "--port", "x"]) == 2
    assert capsys.readouterr().err.count("--") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--precision", "int3"], "choose from fp32"),
        (["serve", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["serve", "--model", "/nowhere"], "'/nowhere' is neither 'bundled', nor an existing folder"),
        (["serve", "--memory-budget", "1kB", "--device", "cpu"], "no room for fp32: it needs"),
        (["generate", ""], "PROMPT is empty"),
        (["generate", "x", "--temperature", "0"], "--temperature: "),
        (["nonsense"], "no command 'nonsense'"),
    ],
)
def test_a_usage_error_names_the_problem(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    assert code in (1, 2)
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_ID", str(tmp_path))
    assert main(["serve"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"bitdial serve: {tmp_path.name} has no config.json: it is not a transformers checkpoint"
    ]


def test_precisions_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precisions"]) == 0
    printed = capsys.readouterr().out
    for name in loaders.PRECISIONS:
        assert re.search(rf"^{name} .*(yes|no: )", printed, re.M)
