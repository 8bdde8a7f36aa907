"""`bitdial completion`, in the shells that are here."""

import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import shtab

from server.__main__ import main
from server.commands import COMMANDS

BASH = """\
{script}
COMP_WORDS=({words} '')
COMP_CWORD={last}
COMP_LINE='{words} '
_shtab_bitdial
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def completed(script: str, words: str) -> list[str]:
    """What Bash offers after ``words`` and a blank."""
    source = BASH.format(script=script, words=words, last=len(words.split()))
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, timeout=120, check=True)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    [
        ("bitdial", {*COMMANDS}, {"nf4"}),
        ("bitdial serve --precision", {"nf4", "auto"}, {"all"}),
        ("bitdial generate --precision", {"nf4"}, {"auto", "all"}),
        ("bitdial report --precisions", {"nf4", "all"}, {"auto"}),
        ("bitdial serve --device", {"cpu", "cuda", "auto"}, {"nf4"}),
        ("bitdial serve --log-level", {"debug", "error"}, {"nf4"}),
        ("bitdial serve --auto-prefer", {"quality", "speed", "memory"}, {"nf4"}),
        ("bitdial generate --kv-dtype", {"fp16", "auto"}, {"nf4", "bf16"}),
        ("bitdial quantize --method", {"int4", "nf4"}, {"fp32", "all"}),
        ("bitdial completion", {"bash", "zsh", "fish"}, {"nf4"}),
    ],
)
def test_bash_completes(script: str, words: str, offered: set[str], not_offered: set[str]) -> None:
    found = set(completed(script, words))
    assert offered <= found
    assert not not_offered & found


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("onnx-i", {"onnx-int8", "onnx-int4"}),
        ("fp32,onnx-i", {"fp32,onnx-int8", "fp32,onnx-int4"}),
        ("fp32,onnx-int8,onnx-i", {"fp32,onnx-int8,onnx-int4"}),
        ("fp32,al", set()),
        ("al", {"all"}),
        ("fp32,fp", {"fp32,fp16", "fp32,fp4"}),
    ],
)
@pytest.mark.parametrize("option", ["report --precisions", "precisions --layers"])
def test_bash_completes_every_name_of_a_list(script: str, option: str, begun: str, offered: set[str]) -> None:
    source = BASH.replace("''", begun).format(script=script, words=f"bitdial {option}", last=3)
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, timeout=120, check=True)
    assert set(done.stdout.split()) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_options(script: str) -> None:
    source = BASH.replace("''", "'--kv'").format(script=script, words="bitdial serve", last=2)
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, timeout=120, check=True)
    assert {line.strip() for line in done.stdout.splitlines()} == {"--kv-cache-memory", "--kv-dtype"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("bitdial ", {*COMMANDS}, {"nf4"}),
        ("bitdial serve --precision ", {"nf4", "auto"}, {"all"}),
        ("bitdial serve --kv", {"--kv-cache-memory", "--kv-dtype"}, {"--device"}),
        ("bitdial serve --log-level ", {"debug", "error"}, {"nf4"}),
        ("bitdial serve --precisions ", {"fp32", "all"}, {"auto"}),
        ("bitdial serve --precisions fp32,", {"fp32,nf4", "fp32,int8"}, {"fp32,fp32", "fp32,all", "all"}),
        (
            "bitdial precisions --layers fp32,nf4,onnx-i",
            {"fp32,nf4,onnx-int4"},
            {"fp32,nf4,fp16", "onnx-int4"},
        ),
        ("bitdial serve --precisions=fp32,onnx-i", {"--precisions=fp32,onnx-int4"}, {"fp32,nf4"}),
    ],
)
def test_fish_completes(
    line: str, offered: set[str], not_offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "fish"]) == 0
    (tmp_path / "script.fish").write_text(capsys.readouterr().out)
    source = f"source {tmp_path / 'script.fish'}; complete -C {line!r}"
    done = subprocess.run(["fish", "--no-config", "-c", source], capture_output=True, text=True, timeout=60)
    found = {one.split("\t")[0] for one in done.stdout.splitlines()}
    assert offered <= found, done.stderr
    assert not not_offered & found


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
@pytest.mark.parametrize(
    ("line", "offered"),
    [("bitdial ser", "bitdial serve "), ("bitdial serve --kv-d", "bitdial serve --kv-dtype "),
     ("bitdial quantize --method lit", "bitdial quantize --method litert-"),
     ("bitdial serve --log-level inf", "bitdial serve --log-level info "),
     ("bitdial serve --precisions dyn", "bitdial serve --precisions dynamic-int8,"),
     ("bitdial serve --precisions fp32,dyn", "bitdial serve --precisions fp32,dynamic-int8,"),
     # a blank takes the comma away again
     ("bitdial serve --precisions fp32,dyn\t ", "bitdial serve --precisions fp32,dynamic-int8 "),
     ("bitdial report --precisions fp32,nf4,lit", "bitdial report --precisions fp32,nf4,litert-"),
     ("bitdial report --precisions fp32,al", "bitdial report --precisions fp32,al")],
)  # fmt: skip
def test_zsh_completes(line: str, offered: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a pseudo-terminal, since zsh completes nowhere else."""
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "_bitdial").write_text(capsys.readouterr().out)
    ours, theirs = os.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    try:
        # the line is printed by a key, since an editor's own display of it may be in any order
        own = "p() { print -r -- \"[$BUFFER]\" }; zle -N p; bindkey '^X' p"
        setup = (
            f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; {own}; print READY$((1+1))"
        )
        os.write(ours, f"{setup}\n".encode())
        _read_until(ours, "READY2")
        keys = line if "\t" in line else f"{line}\t"
        os.write(ours, f"{keys}\x18".encode())
        assert f"[{offered}]" in _read_until(ours, "]")
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def _read_until(terminal: int, end: str) -> str:
    """What a terminal shows, up to ``end``; for a minute."""
    shown, until = "", time.monotonic() + 60
    while end not in shown:
        assert time.monotonic() < until, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


@pytest.mark.parametrize("shell", shtab.SUPPORTED_SHELLS)
def test_every_shell_has_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["ksh"], ["bash", "zsh"]])
def test_an_unknown_shell_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *arguments]) == 2
    assert capsys.readouterr().err.startswith("bitdial completion: name your shell: bash, zsh")
