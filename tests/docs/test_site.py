"""The documents as a site, built with warnings as errors, and the pages that are made from the app."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI

from server.errors import (
    BadRequest,
    DeadlinePassed,
    GenerationFailed,
    Invalid,
    NotLoaded,
    NotReady,
    Overloaded,
    ServiceError,
    Unavailable,
)
from server.observability.exposition import expose
from server.observability.metrics import Metrics
from tests.docs.blocks import DOCS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(DOCS / "site" / "mkdocs.yml"),
        "-d",
        str(folder),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    pages = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    documents = {path.stem for path in DOCS.glob("*.md")}
    assert documents | {"index", "changelog", "reference"} <= pages


def test_pages_load_nothing_from_other_addresses(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text()
        )
        assert not [target for target in loaded if target.startswith(("http:", "https:", "//"))], page.name


def test_the_reference_has_every_route_and_field(site: Path, make_app: Callable[..., FastAPI]) -> None:
    page = (site / "reference.html").read_text()
    for path, methods in make_app().openapi()["paths"].items():
        if path.startswith("/models/"):
            continue
        for method, operation in methods.items():
            assert re.search(rf">{method.upper()} {re.escape(path)}<", page), (method, path)
            for content in operation.get("requestBody", {}).get("content", {}).values():
                for field in content["schema"].get("properties", ()):
                    assert f"<code>{field}</code>" in page


def test_operations_names_the_outcomes_and_their_statuses() -> None:
    text = (DOCS / "operations.md").read_text()
    described = dict(re.findall(r"^\| `(\w+)` \| ([\d, ]*)\|", text, re.M))
    # of a request that reaches the model; others end before it is known which one they are for
    errors: list[ServiceError] = [BadRequest(""), Invalid(""), Unavailable(""), NotLoaded(""), NotReady("")]
    errors += [GenerationFailed(""), ServiceError(""), DeadlinePassed(""), Overloaded("")]
    by_outcome: dict[str, list[int]] = {"success": [], "cancelled": []}
    for error in errors:
        by_outcome.setdefault(error.outcome, []).append(error.status)
    found = {name: [int(one) for one in re.findall(r"\d+", cell)] for name, cell in described.items()}
    assert found == by_outcome


def test_operations_names_exactly_the_metrics() -> None:
    metrics = Metrics("m")
    described = re.findall(r"^\| `(bitdial_\w+)` \| (\w+) \|", (DOCS / "operations.md").read_text(), re.M)
    exposed = re.findall(r"^# TYPE (\w+) (\w+)$", expose([metrics], "").body.decode(), re.M)
    assert sorted(described) == sorted(exposed)
