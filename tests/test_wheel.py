"""The wheel that `python -m build` makes: contents, tag, and kernels that load where it is installed."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders.kernels.build import TARGETS

ROOT = Path(__file__).resolve().parent.parent
COPIED = [
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "loaders",
    "server",
]
Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds the sdist and from it the wheel, with the compilers on the given PATH; returns their folder."""
    source = tmp_path_factory.mktemp("source")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.pyc", "*.so"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    (source / "loaders/kernels/kernels-avx2-000000000000.so").write_bytes(b"of an older source")

    def run(path: str) -> Path:
        out = tmp_path_factory.mktemp("dist")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": path
        }
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return out

    return run


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and ".part" not in path.name
    }


def contents(wheel: Path) -> tuple[set[str], set[str]]:
    """The wheel's files, without those of its metadata: the compiled ones, and the others."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {name for name in names if name.endswith(".so")}
    return compiled, names - compiled


def test_without_a_compiler_the_wheel_is_pure_python(build: Build, tmp_path: Path) -> None:
    dist = build(str(tmp_path))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name.endswith("-py3-none-any.whl")
    expected = files(ROOT / "loaders") | files(ROOT / "server")
    assert contents(wheel) == (set(), expected)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md"} <= packed
    assert not [name for name in packed if name.endswith(".so") or name.startswith(("tests/", "docs/"))]
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow  # compiles for every instruction set
@pytest.mark.skipif(
    shutil.which("cc") is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="kernels are compiled on Linux on x86-64, with a C compiler",
)
def test_with_a_compiler_the_wheel_has_kernels_that_load_where_it_is_installed(
    build: Build, tmp_path: Path
) -> None:
    (wheel,) = build(os.environ["PATH"]).glob("*.whl")
    assert "-py3-none-manylinux_2_" in wheel.name
    assert wheel.name.endswith("_x86_64.whl")
    compiled, others = contents(wheel)
    assert {name.rsplit("-", 1)[0] for name in compiled} == {
        f"loaders/kernels/kernels-{name}" for name in TARGETS
    }
    assert others == files(ROOT / "loaders") | files(ROOT / "server")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from loaders import kernels as k; print(k.__file__, [k.load(name) for name in k.runnable()])"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.startswith(str(tmp_path / "installed")), shown.stderr
    assert "not " not in shown.stdout  # a reason in place of a library
