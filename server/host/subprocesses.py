"""Commands that start a module of this project in another process."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# appended: packages of the interpreter's environment take precedence over those beside this project
_START = "import sys; sys.path.append({root!r}); from {module} import main; main()"


def start_command(module: str, python: Path | str) -> list[str]:
    """The command that runs a module's ``main`` with that interpreter."""
    return [str(python), "-c", _START.format(root=str(ROOT), module=module)]
