"""Starting Python processes that find this package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# appended, so that an environment's own packages go before those this project is installed beside
_START = "import sys; sys.path.append({root!r}); from {module} import main; main()"


def start_command(module: str, python: Path | str) -> list[str]:
    """Runs ``main`` of a module of this project with that interpreter."""
    return [str(python), "-c", _START.format(root=str(ROOT), module=module)]
