"""The documents name existing settings, routes, precisions, modules and links."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI

import loaders
from server.settings.server import Settings

ROOT = Path(__file__).resolve().parent.parent
README, API, SETTINGS, STRUCTURE = (
    ROOT / name for name in ("README.md", "docs/api.md", "docs/settings.md", "docs/structure.md")
)
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS = [README, *OTHERS, *sorted((ROOT / "docs").glob("*.md"))]
VARIABLES = {name.upper() for name in Settings.model_fields} | {"MODEL"}
EXTERNAL = {"HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "TORCH_INDEX_URL", "PYTHON", "VARIANT", "XDG_CACHE_HOME"}
EXTERNAL |= {"OMP_NUM_THREADS"}
"""Variables of Hugging Face, the installer, the image, the desktop and OpenMP."""


def test_the_table_of_settings_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "document_settings.py"))["document"]()
    assert SETTINGS.read_text() == written, "run scripts/document_settings.py"


def test_exactly_the_settings_are_documented_with_their_defaults() -> None:
    rows = re.findall(r"^\| `([A-Z0-9_]+)`[^|]*\| [^|]*\| [`*](.*?)[`*] \|", SETTINGS.read_text(), re.M)
    assert sorted(name.lower() for name, _ in rows) == sorted(Settings.model_fields)
    for name, default in rows:
        value = Settings.model_fields[name.lower()].default
        if isinstance(value, bool):
            assert default == ("yes" if value else "no")
        elif value not in (None, ()):
            assert type(value)(default) == value


@pytest.mark.parametrize("document", [README, API, SETTINGS, STRUCTURE], ids=lambda path: path.name)
def test_named_settings_exist(document: Path) -> None:
    text = document.read_text()
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", text)) | set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", text))
    assert named - EXTERNAL <= VARIABLES


def documented_routes() -> set[tuple[str | None, str]]:
    """(method or None, path) of every route in the text and the examples of docs/api.md."""
    text = API.read_text()
    found: set[tuple[str | None, str]] = set()
    for span in re.findall(r"`([^`\n]+)`", text):
        if match := re.fullmatch(r"(?:(GET|POST) )?(/(?!v1$)[\w/{}:.-]*)(?:\?\S*)?", span):
            found.add((match[1], match[2]))
    for line in re.findall(r"^\$ curl (?:.*\\\n)*.*", text, re.M):
        path = re.search(r"http://127\.0\.0\.1:\d+(/[\w/:.-]*)", line)
        assert path is not None, line
        found.add(("POST" if "-d " in line or "-X POST" in line else "GET", path[1]))
    return found


def test_the_routes_of_the_document_and_of_the_app_are_the_same(make_app: Callable[..., FastAPI]) -> None:
    paths = {"/docs": {"get": {}}, "/openapi.json": {"get": {}}, **make_app().openapi()["paths"]}
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    documented = documented_routes()

    def matches(named: tuple[str | None, str], route: tuple[str, str]) -> bool:
        pattern = re.sub(r"\\{(\w+)\\}", "[^/]+", re.escape(route[1]))
        return named[0] in (None, route[0]) and re.fullmatch(pattern, named[1]) is not None

    assert not [named for named in documented if not any(matches(named, route) for route in routes)]
    for method, path in routes:
        bare = path.removeprefix("/models/{model}") or "/"  # documented for all of them at once
        assert any(matches(named, (method, bare)) for named in documented), (method, path)


def test_the_table_of_precisions_is_the_registry() -> None:
    table = README.read_text().split("## Precisions")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \| [^|]* \| ([^|]*) \|", table, re.M)
    places = {name: where for names, where in rows for name in re.findall(r"`([^`]+)`", names)}
    assert list(places) == list(loaders.PRECISIONS)
    for name, where in places.items():
        assert "CPU" in where
        reason = loaders.availability(name, "cuda").reason or ""
        assert ("CUDA" in where) == ("CPU" not in reason), (name, reason)


def test_the_structure_lists_exactly_the_modules() -> None:
    tree = STRUCTURE.read_text().split("## Folders\n\n```\n")[1].split("\n```")[0]
    named, above = set[str](), list[str]()
    for indent, name in re.findall(r"^((?:  )*)(\w+\.py|\w+/)", tree, re.M):
        above[len(indent) // 2 :] = [name]
        named.add("".join(above))
    there = {
        str(path.relative_to(ROOT)) if path.name != "__init__.py" else f"{path.parent.relative_to(ROOT)}/"
        for room in ("loaders", "server")
        for path in (ROOT / room).rglob("*.py")
    }
    inside = re.compile(r"(server/bench|loaders/(kernels|bundled))/.+")  # listed as a whole
    assert named == {name for name in there if not inside.fullmatch(name)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_anchors_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
