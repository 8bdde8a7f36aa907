"""The layers of the packages, read from the imports. ``python -m tests.test_architecture`` prints them."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import loaders

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "loaders").rglob("*.py")), *sorted((ROOT / "server").rglob("*.py"))]
LAYERS = (
    "server.__main__",
    "server.commands",
    "server.app",
    "server.routes",
    "server.evaluation",
    "server.service",
    "server.report server.observability",
    "server.bench",
    "server.http server.engine",
    "server.settings",
    "server.host server.lifecycle",
    "server.concurrency server.errors server.terminal server.version server",
    "loaders.quality loaders.layer_errors",
    "loaders.precisions",
    "loaders.footprint loaders.runners",
    "loaders.pretrained loaders.checkpoint",
    "loaders.cuda",
    "loaders.layers",
    "loaders.hub loaders.end_tokens loaders.config_check loaders.kernels",
    "loaders",
    "loaders.errors",
    "loaders.base",
    "loaders.runner loaders.malloc loaders.tokenizer_faults loaders.bundled",
)
"""Packages from the top down; a package imports from layers below its own."""


class Untyped(ast.NodeTransformer):
    """Drops imports for type checkers."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imports(path: Path, typing: bool = True) -> set[str]:
    """Every module that a file imports anywhere; ``typing``: including imports for type checkers."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree if typing else Untyped().visit(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (full & modules().keys()) or {node.module}
    return found


@cache
def modules() -> dict[str, Path]:
    """The modules of loaders and server by name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def arrows() -> Counter[tuple[str, str]]:
    """The number of imports from one package to another."""
    return Counter(
        (room(module), room(target))
        for module, path in modules().items()
        for target in imports(path) & modules().keys()
        if room(module) != room(target)
    )


def reached(module: str) -> Iterator[str]:
    """All modules that this one imports, directly or indirectly."""
    seen, waiting = {module}, [module]
    while waiting:
        for target in imports(modules()[waiting.pop()]) & modules().keys() - seen:
            seen.add(target)
            waiting.append(target)
            yield target


def importers(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    }


def test_a_package_imports_from_layers_below_its_own() -> None:
    floor = {name: height for height, names in enumerate(LAYERS) for name in names.split()}
    assert {room(module) for module in modules()} == floor.keys()
    assert not [(above, below) for above, below in arrows() if floor[above] >= floor[below]]


def test_there_are_no_import_cycles() -> None:
    graph = {
        module: imports(path, typing=False) & modules().keys() - {module}
        for module, path in modules().items()
    }
    assert list(TopologicalSorter(graph).static_order())


def test_the_server_imports_no_benchmark() -> None:
    serving = set(reached("server.app"))
    assert "server.report.background" in serving
    assert not [name for name in serving if name.startswith(("server.bench", "server.report.measuring"))]


def test_the_engine_imports_no_http_and_no_settings() -> None:
    engine = {name for name in modules() if name.startswith("server.engine.")}
    known = {target for name in engine for target in reached(name)}
    assert not [name for name in known if name.startswith(("server.http", "server.settings"))]


def test_loaders_import_no_server() -> None:
    assert not [name for name in importers("server") if name.startswith("loaders/")]


def test_the_process_of_a_chat_template_imports_little() -> None:
    known = sys.stdlib_module_names | {"jinja2"}
    for name in ("process", "template"):
        found = imports(ROOT / f"server/service/chat/{name}.py") - {"server.service.chat.template"}
        assert {module.split(".")[0] for module in found} <= known


def test_only_metrics_imports_prometheus() -> None:
    assert importers("prometheus_client") == {"server/observability/metrics.py"}


def test_only_tracing_imports_opentelemetry() -> None:
    assert importers("opentelemetry") == {"server/observability/tracing.py"}


@pytest.mark.parametrize(
    "name", ["engine/scheduler.py", "engine/sequence.py", "service/text/codec.py", "routes/schemas.py"]
)
def test_these_modules_import_no_torch(name: str) -> None:
    assert f"server/{name}" not in importers("torch")


def test_only_the_bitsandbytes_loader_imports_bitsandbytes() -> None:
    assert importers("bitsandbytes") == {"loaders/precisions/bnb.py"}


def test_every_precision_has_its_module() -> None:
    for module in loaders.PRECISIONS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert set(loaders.ALIASES.values()) <= set(loaders.PRECISIONS)
    assert not set(loaders.ALIASES) & set(loaders.PRECISIONS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_fits_in_the_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


if __name__ == "__main__":
    for (above, below), count in sorted(arrows().items()):
        print(f"{above:<24}{below:<24}{count:>3}")
    print(f"{len({room(name) for name in modules()})} rooms, {len(arrows())} arrows between them")
