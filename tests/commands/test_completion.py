"""`bitdial completion`, in the shells that are here."""

import shutil
import subprocess

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
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, timeout=30, check=True)
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
        ("bitdial completion", {"bash", "zsh", "fish"}, {"nf4"}),
    ],
)
def test_bash_completes(script: str, words: str, offered: set[str], not_offered: set[str]) -> None:
    found = set(completed(script, words))
    assert offered <= found
    assert not not_offered & found


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_options(script: str) -> None:
    source = BASH.replace("''", "'--kv'").format(script=script, words="bitdial serve", last=2)
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, timeout=30, check=True)
    assert {line.strip() for line in done.stdout.splitlines()} == {"--kv-cache-memory", "--kv-dtype"}


@pytest.mark.parametrize("shell", shtab.SUPPORTED_SHELLS)
def test_every_shell_has_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["ksh"], ["bash", "zsh"]])
def test_an_unknown_shell_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *arguments]) == 2
    assert capsys.readouterr().err.startswith("bitdial completion: name your shell: bash, zsh")
