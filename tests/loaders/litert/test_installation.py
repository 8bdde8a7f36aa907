"""The converter's environment: made once, by one process, whole or not at all. With a script as Python."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from loaders.base import ignore_progress
from loaders.litert import environment, installation, processes
from loaders.litert.processes import ConverterUnavailable, output_lines
from tests.conftest import wait_until

PACKAGES = "echo Collecting torch==2.13.0; echo '  Downloading torch-2.13.0.whl (190.2 MB)'"
DONE = "echo Installing collected packages: a, torch"


class Python:
    """Makes an environment whose interpreter runs ``pip`` and counts the installations."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(environment.FOLDER)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setattr("loaders.litert.installation.sys.executable", str(folder / "python"))
        self.log, self.made = folder / "log", environment.default_folder()
        self.installs(f"{PACKAGES}; {DONE}")

    def installs(self, script: str) -> None:
        """``script``: of ``python -m pip``."""
        python = self.log.with_name("python")
        inner = f'#!/bin/sh\n[ "$2" = pip ] || exit 0\necho "$@" >> {self.log}\n{script}\n'
        self.log.with_name("inner").write_text(inner)
        python.write_text(
            f"#!/bin/sh\nmkdir -p {self.made}/bin\ncp {self.log.with_name('inner')} {self.made}/bin/python\n"
            f"chmod +x {self.made}/bin/python\n"
        )
        python.chmod(0o755)

    @property
    def installed(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Python:
    return Python(tmp_path, monkeypatch)


def test_it_is_made_once_and_reports_the_packages(python: Python) -> None:
    stages: list[str] = []
    found = environment.ensure(lambda stage, *_: stages.append(stage))
    assert found == environment.interpreter() == python.made / "bin" / "python"
    stage = "installing LiteRT's converter"
    assert {stage, f"{stage}: torch", f"{stage}: torch, 190.2 MB", f"{stage}: unpacking"} <= set(stages)
    assert environment.ensure(ignore_progress) == found
    assert python.installed == 1
    assert "transformers==" in python.log.read_text()


def test_one_of_other_versions_is_made_again(python: Python) -> None:
    environment.ensure(ignore_progress)
    (python.made / installation.COMPLETE).write_text("torch==2.0.0\n")
    assert environment.interpreter() is None
    environment.ensure(ignore_progress)
    assert python.installed == 2


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "echo WARNING: Retrying after connection broken\n"
            "echo ERROR: No matching distribution found for torch==2.13.0",
            "(ERROR: No matching distribution found for torch==2.13.0); "
            "it is installed once, which needs a network",
        ),
        (
            "echo 'ERROR: Could not install packages: [Errno 28] No space left on device'; echo",
            "(the disk is full)",
        ),
        ("echo The reason", "(The reason)"),
        ("true", "(exit code 1)"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(python: Python, said: str, message: str) -> None:
    python.installs(f"{said}\nexit 1")
    with pytest.raises(ConverterUnavailable) as caught:
        environment.ensure(ignore_progress)
    assert str(caught.value) == f"LiteRT's converter can't be used {message}"
    assert environment.interpreter() is None
    assert not python.made.exists()


def test_interrupted_nothing_is_left_and_the_installer_is_dead(python: Python, tmp_path: Path) -> None:
    python.installs(f"echo $$ > {tmp_path}/pid\n{PACKAGES}\nexec sleep 60")

    def interrupt(stage: str, current: int, total: int) -> None:
        if "torch" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment.ensure(interrupt)
    assert not python.made.exists()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    python.installs(DONE)
    assert environment.ensure(ignore_progress).exists()  # the lock is free


def test_two_at_once_install_it_once(python: Python, tmp_path: Path) -> None:
    python.installs(f"{PACKAGES}\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.05; done")
    stages: list[str] = []
    threads = [
        threading.Thread(target=environment.ensure, args=(lambda stage, *_: stages.append(stage),))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: "waiting for another process" in stages)
    (tmp_path / "go").touch()
    for thread in threads:
        thread.join()
    assert python.installed == 1


def test_too_little_room_is_said_before_anything_is_written(
    python: Python, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr("loaders.litert.installation.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        ConverterUnavailable, match=r"takes 2\.\d GB in the user's cache, where 1\.0 are free"
    ):
        environment.ensure(ignore_progress)
    assert not python.made.exists()


def test_a_cache_that_cannot_be_written_is_one_line(python: Python, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        ConverterUnavailable, match=r"can't be installed in the user's cache \(.+\); XDG_CACHE"
    ):
        environment.ensure(ignore_progress)


def test_without_the_module_venv_its_advice_is_shown(python: Python, tmp_path: Path) -> None:
    script = (
        "echo you need to run:; echo '    apt install python3.11-venv'; echo; echo Failing command: x; exit 1"
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ConverterUnavailable, match=r"\(apt install python3\.11-venv\)$"):
        environment.ensure(ignore_progress)


def test_a_silent_program_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_TICK", 10)
    lines: list[Any] = [*output_lines(["sh", "-c", "printf 'a\\nb'; sleep 0.5; printf 'c\\n\\nd'"])]
    assert lines[0] == "a"
    assert lines[-2:] == ["", "d"]
    assert "bc" in lines
    assert lines.count("") > 1


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConverterUnavailable, match=r"can't be used \(No such file or directory\)"):
        [*output_lines([str(tmp_path / "none")])]
