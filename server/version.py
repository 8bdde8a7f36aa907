"""The version of the installed package, or of pyproject.toml when run from a checkout."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _find() -> str:
    try:
        return version("bitdial")
    except PackageNotFoundError:
        pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])


VERSION = _find()
