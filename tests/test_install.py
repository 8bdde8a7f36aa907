"""scripts/install: the source of torch, uv or pip, and what is printed; stubs of uv and pip record calls."""

import functools
import http.server
import os
import platform
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
torch_index = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/torch_index.py")))
TORCH = next(
    line for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if line.startswith("torch==")
)
UNREACHABLE = "http://127.0.0.1:9"  # the discard port, on which nothing listens

# makes environments with itself inside, and records pip's arguments; with FAIL in them pip fails
PYTHON = f"""#!/bin/sh
case "$*" in
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*) echo "pip $*" >> calls; case "$*" in *"${{FAIL:-nothing fails}}"*) exit 1 ;; esac ;;
  "-m pip"*|loaders/*) ;;
  *"version(\\"torch\\")"*) [ -f torch-installed ] ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >> calls
[ ! -f uv-fails ] || exit 2
[ "$1" != venv ] || { mkdir -p .venv/bin && cp python .venv/bin/python; }
"""

on_pc = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="other platforms have one build"
)
without_card = pytest.mark.skipif(
    torch_index.nvidia_card(Path("/"), os.environ.get("PATH")) is not None, reason="this host has a card"
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an index that has torch's page."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "torch").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("system", "machine", "card", "environment", "address", "chosen", "reason"),
    [
        ("Linux", "x86_64", None, {}, "index", True, "no NVIDIA card"),
        ("Linux", "x86_64", None, {}, UNREACHABLE, "", "refused"),
        ("Linux", "x86_64", None, {}, "index/nothing", "", "File not found"),
        ("Linux", "x86_64", "dev/nvidia0", {}, "index", "", "an NVIDIA card (/dev/nvidia0)"),
        ("Linux", "x86_64", "proc/driver/nvidia", {}, "index", "", "an NVIDIA card (/proc/driver/nvidia)"),
        ("Linux", "aarch64", None, {}, "index", "", "this platform"),
        ("Darwin", "arm64", None, {}, "index", "", "this platform"),
        ("Linux", "x86_64", None, {"TORCH_INDEX_URL": ""}, "index", "", "TORCH_INDEX_URL"),
        ("Linux", "x86_64", None, {"TORCH_INDEX_URL": "http://i"}, "index", "http://i", "TORCH_INDEX_URL"),
    ],
)
def test_the_index_follows_from_the_host(
    system: str,
    machine: str,
    card: str | None,
    environment: dict[str, str],
    address: str,
    chosen: str | bool,
    reason: str,
    index: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if card:
        (tmp_path / card).mkdir(parents=True)
    address = address.replace("index", index)
    found = torch_index.choose({"PATH": str(tmp_path), **environment}, address, tmp_path)
    assert found.address == (address if chosen is True else chosen)
    assert reason in found.reason


@on_pc
def test_the_drivers_command_is_a_card(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert "nvidia-smi" in torch_index.choose({"PATH": str(tmp_path)}, UNREACHABLE, tmp_path).reason


class Checkout:
    """A folder with the files that scripts/install reads, and the stubs."""

    def __init__(self, folder: Path, cpu_builds: str) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        for name in ("pyproject.toml", "scripts/install", "scripts/constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        source = (ROOT / "scripts/torch_index.py").read_text()
        (folder / "scripts/torch_index.py").write_text(source.replace(torch_index.CPU_BUILDS, cpu_builds))
        self.program("python", PYTHON)
        (folder / "tools").mkdir()

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def install(self, *arguments: str, **variables: str) -> tuple[list[str], str]:
        """Runs scripts/install; returns the calls of uv and pip, and what it printed."""
        path = f"{self.folder / 'tools'}:/usr/bin:/bin"
        environment = {"PATH": path, "PYTHON": str(self.folder / "python"), **variables}
        command = [str(self.folder / "scripts/install"), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=self.folder.parent, capture_output=True, text=True
        )
        calls = self.folder / "calls"
        made = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return made, done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


@pytest.fixture
def checkout(tmp_path: Path, index: str) -> Checkout:
    return Checkout(tmp_path, index)


@on_pc
@without_card
def test_without_a_card_torch_comes_from_the_cpu_index(checkout: Checkout, index: str) -> None:
    (torch, rest), said = checkout.install("--dev")
    assert torch.startswith("pip ")
    assert f"--index-url {index} --no-deps {TORCH}" in torch
    assert "--index-url" not in rest
    assert rest.endswith("--editable .[dev]")
    assert f"torch without CUDA from {index}: this host has no NVIDIA card\n" in said
    assert said.endswith("Installed. Its command, from this folder: .venv/bin/bitdial --help\n")
    assert checkout.install() == ([], "")  # the second time there is nothing to do


@on_pc
@without_card
def test_an_index_that_gives_no_torch_is_left_for_the_ordinary_one(checkout: Checkout, index: str) -> None:
    (first, second, _), said = checkout.install(FAIL=index)
    assert index in first
    assert "--index-url" not in second
    assert second.endswith(TORCH)
    assert f"torch from the ordinary index, perhaps gigabytes with CUDA: {index} gave no {TORCH}" in said


def test_a_named_index_is_not_replaced(checkout: Checkout) -> None:
    (only,), said = checkout.install(TORCH_INDEX_URL="http://named", FAIL="http://named")
    assert "--index-url http://named" in only
    assert "exit code 1" in said
    assert "failed: the reason is above" in said
    (torch, _), said = checkout.install(TORCH_INDEX_URL="")
    assert "--index-url" not in torch
    assert "the ordinary index, as TORCH_INDEX_URL says" in said


def test_an_installed_torch_is_kept(checkout: Checkout) -> None:
    (checkout.folder / "torch-installed").touch()
    (only,), said = checkout.install()
    assert "--editable" in only
    assert f"{TORCH} is installed already" in said


def test_uv_is_used_where_it_is_installed(checkout: Checkout) -> None:
    checkout.program("tools/uv", UV)
    (venv, torch, rest), said = checkout.install("--dev", TORCH_INDEX_URL="http://named")
    assert venv == f"uv venv --seed --python {checkout.folder / 'python'} .venv"
    common = "uv pip install --python .venv/bin/python --constraint scripts/constraints.txt"
    assert torch == f"{common} --index-url http://named --no-deps {TORCH}"
    assert rest == f"{common} --editable .[dev]"
    assert "tools/uv" in said


def test_where_uv_fails_pip_installs(checkout: Checkout) -> None:
    checkout.program("tools/uv", UV)
    (checkout.folder / "uv-fails").touch()
    calls, said = checkout.install(TORCH_INDEX_URL="")
    assert [call.split()[0] for call in calls] == ["uv", "uv", "pip", "uv", "pip"]
    assert "uv could not install this, so pip tries" in said
    assert "exit code" not in said
