"""Every place shows the version of pyproject.toml."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server import version
from server.__main__ import main
from tests.test_image import instructions, pairs

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION: str = PROJECT["project"]["version"]


def test_the_command_and_the_routes_show_the_version(
    client: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitdial {VERSION}\n"
    assert client.get("/info").json()["version"] == VERSION
    assert client.get("/openapi.json").json()["info"]["version"] == VERSION


def test_a_checkout_that_is_not_installed_has_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", nothing)
    assert version._find() == VERSION


def test_the_images_label_has_the_version() -> None:
    defaults = [rest for name, rest in instructions() if name == "ARG" and rest.startswith("VERSION=")]
    assert defaults == [f"VERSION={VERSION}"]
    labels = pairs("LABEL")
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == "$VERSION"
    assert {f"{prefix}revision", f"{prefix}source"} <= set(labels)


def test_the_changelog_ends_at_the_version() -> None:
    """``Unreleased`` comes first; the newest release is this version or an earlier one."""
    titles = re.findall(r"^## \[(.*?)\](?: - \d{4}-\d\d-\d\d)?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert titles[0] == "Unreleased"
    released = [tuple(map(int, title.split("."))) for title in titles[1:]]
    assert released == sorted(released, reverse=True)
    assert all(one <= tuple(map(int, VERSION.split("."))) for one in released)


def test_every_package_is_installed() -> None:
    """setuptools finds every package; a checkout would run without, an image would not."""
    assert PROJECT["tool"]["setuptools"]["packages"]["find"] == {"include": ["loaders*", "server*"]}
    folders = {path.parent for room in ("loaders", "server") for path in (ROOT / room).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
