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
    "server.__main__ server.ray_app",
    "server.commands server.ray",
    "server.app",
    "server.routes",
    "server.state",
    "server.served_model",
    "server.evaluation",
    "server.planning",
    "server.service",
    "server.report server.observability",
    "server.bench",
    "server.http server.engine",
    "server.settings",
    "server.host server.lifecycle",
    "server.activity server.concurrency server.errors server.playground server.tables server.terminal "
    "server.version server",
    "loaders.interactive",
    "loaders.quality loaders.layer_errors",
    "loaders.precisions",
    "loaders.footprint loaders.runners",
    "loaders.artifacts loaders.training",
    "loaders.calibration loaders.litert loaders.onnx",
    "loaders.pretrained loaders.checkpoint",
    "loaders.cuda",
    "loaders.layers loaders.end_tokens loaders.texts",
    "loaders.architectures loaders.saved",
    "loaders.hub loaders.config_check loaders.kernels loaders.manifest",
    "loaders",
    "loaders.config_values loaders.foreign_errors",
    "loaders.errors loaders.locking",
    "loaders.base",
    "loaders.runner loaders.import_noise loaders.malloc loaders.model_id "
    "loaders.tokenizer_faults loaders.bundled",
    "loaders.affine loaders.kv_cache",
)
"""Packages from the top down; a package imports from layers below its own."""
MOST_LINES = 250
LONG = {
    "scripts/train_bundled.py": 274,
    "tests/bench/test_gpu_check.py": 311,
    "tests/engine/test_engine.py": 322,
    "tests/engine/test_overlap.py": 309,
    "tests/host/test_threads.py": 267,
    "tests/http/connection/test_early_refusal.py": 322,
    "tests/http/connection/test_framing.py": 347,
    "tests/http/connection/test_open_connections.py": 282,
    "tests/http/connection/test_slow_clients.py": 263,
    "tests/http/test_http_robustness.py": 254,
    "tests/http/test_overload.py": 268,
    "tests/loaders/cuda/test_graph_runner.py": 267,
    "tests/loaders/quality/test_quality.py": 274,
    "tests/report/test_report.py": 329,
    "tests/report/test_report_noise.py": 292,
    "tests/routes/openai/test_openai_extras.py": 335,
    "tests/routes/test_admin.py": 277,
    "tests/routes/test_compare.py": 262,
    "tests/routes/test_generate.py": 267,
    "tests/routes/test_places.py": 280,
    "tests/routes/test_report_route.py": 376,
    "tests/service/chat/test_chat_renderer.py": 286,
    "tests/service/test_generation.py": 295,
}
"""Longer files, and their lines: entries shrink or go, none is added."""


class Untyped(ast.NodeTransformer):
    """Drops imports for type checkers."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


@cache  # most tests ask for every file
def imports(path: Path, typing: bool = True) -> frozenset[str]:
    """Every module that a file imports anywhere; ``typing``: including imports for type checkers."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree if typing else Untyped().visit(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (full & modules().keys()) or {node.module}
    return frozenset(found)


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


def test_only_observability_imports_prometheus() -> None:
    found = importers("prometheus_client")
    assert found
    assert all(name.startswith("server/observability/") for name in found)


def test_only_its_own_package_imports_ray() -> None:
    assert all(name.startswith(("server/ray/", "server/ray_app.py")) for name in importers("ray"))
    assert not [name for name in reached("server.__main__") if name.startswith("server.ray")]


def test_only_its_package_imports_opentelemetry() -> None:
    """It is an extra: what imports the package does so where a collector is configured."""
    found = importers("opentelemetry")
    assert found
    assert all(name.startswith("server/observability/otlp/") for name in found)


@pytest.mark.parametrize(
    "name", ["engine/scheduler.py", "engine/sequence.py", "service/text/codec.py", "routes/schemas.py"]
)
def test_these_modules_import_no_torch(name: str) -> None:
    assert f"server/{name}" not in importers("torch")


def test_only_the_module_of_its_layers_imports_bitsandbytes() -> None:
    assert importers("bitsandbytes") == {"loaders/layers/bitsandbytes_layers.py"}


def test_every_precision_has_its_module() -> None:
    for module in loaders.PRECISIONS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert set(loaders.ALIASES.values()) <= set(loaders.PRECISIONS)
    assert not set(loaders.ALIASES) & set(loaders.PRECISIONS)


def test_a_file_has_at_most_250_lines() -> None:
    folders = (ROOT / name for name in ("loaders", "server", "scripts", "tests"))
    long = {
        str(path.relative_to(ROOT)): count
        for folder in folders
        for path in folder.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not {name: count for name, count in long.items() if count > LONG.get(name, 0)}
    assert LONG.keys() <= long.keys(), "these are short enough now: drop them from the list"


if __name__ == "__main__":
    for (above, below), count in sorted(arrows().items()):
        print(f"{above:<24}{below:<24}{count:>3}")
    print(f"{len({room(name) for name in modules()})} rooms, {len(arrows())} arrows between them")
