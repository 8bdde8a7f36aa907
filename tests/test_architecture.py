"""The arrows between the rooms, read from the imports."""

import ast
import sys
from pathlib import Path

import pytest

import loaders

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "loaders").rglob("*.py")), *sorted((ROOT / "server").rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def importers(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    }


def test_loaders_know_no_server() -> None:
    assert not [name for name in importers("server") if name.startswith("loaders/")]


def test_the_process_of_a_chat_template_starts_in_a_moment() -> None:
    known = sys.stdlib_module_names | {"jinja2"}
    for name in ("process", "template"):
        found = imports(ROOT / f"server/service/chat/{name}.py") - {"server.service.chat.template"}
        assert {module.split(".")[0] for module in found} <= known


def test_only_metrics_knows_prometheus() -> None:
    assert importers("prometheus_client") == {"server/observability/metrics.py"}


def test_only_tracing_knows_opentelemetry() -> None:
    assert importers("opentelemetry") == {"server/observability/tracing.py"}


@pytest.mark.parametrize(
    "name", ["engine/scheduler.py", "engine/sequence.py", "service/text/codec.py", "routes/schemas.py"]
)
def test_no_tensors_where_none_belong(name: str) -> None:
    assert f"server/{name}" not in importers("torch")


def test_only_the_bitsandbytes_loader_knows_bitsandbytes() -> None:
    assert importers("bitsandbytes") == {"loaders/precisions/bnb.py"}


def test_every_precision_has_its_module() -> None:
    for module in loaders.PRECISIONS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert set(loaders.ALIASES.values()) <= set(loaders.PRECISIONS)
    assert not set(loaders.ALIASES) & set(loaders.PRECISIONS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_fits_in_the_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
