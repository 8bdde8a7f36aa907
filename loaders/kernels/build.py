"""Compiles the CPU kernels beside their source: ``python -m loaders.kernels.build``.

Runs once at installation, if there is a C compiler; nothing is compiled while serving. Without the
libraries, or on another kind of CPU, torch's own kernels compute.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ["linear.c", "decoder.c", "summary.c"]
HEADERS = sorted(path.name for path in FOLDER.glob("*.h"))
TARGETS = {
    "avx512-bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
    "avx512": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx2": ["-march=x86-64-v3"],
}


class BuildError(Exception):
    """The kernels can't be compiled here; the message gives the reason."""


def compiled(target: str) -> Path:
    """The path of the compiled library for ``target``; its name contains a hash of the sources and flags."""
    digest = hashlib.sha256(repr(TARGETS[target]).encode())
    for name in SOURCES + HEADERS:
        digest.update((FOLDER / name).read_bytes())
    return FOLDER / f"kernels-{target}-{digest.hexdigest()[:12]}.so"


def build() -> list[Path]:
    """Compiles the missing libraries and removes those of older sources; returns the new paths.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    wanted = {target: compiled(target) for target in TARGETS}
    for old in set(FOLDER.glob("kernels-*.so")) - set(wanted.values()):
        old.unlink()
    missing = {target: path for target, path in wanted.items() if not path.exists()}
    for target, path in missing.items():
        print(f"CPU kernels: compiling for {target} …", file=sys.stderr, flush=True)
        _compile(TARGETS[target], path)
    return list(missing.values())


def _compile(flags: list[str], path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise BuildError("there is no C compiler (install gcc, or name one: CC=…)")
    with tempfile.TemporaryDirectory() as folder:
        # compiled with OpenMP but linked without: the symbols are those of the runtime that torch has loaded
        options = ["-O3", *flags, "-fopenmp", "-fPIC", "-Wall", "-Wextra"]
        objects = [f"{folder}/{name}.o" for name in SOURCES]
        for name, compiled in zip(SOURCES, objects, strict=True):
            _run([compiler, *options, "-c", "-o", compiled, str(FOLDER / name)])
        linked = f"{folder}/kernels.so"
        _run([compiler, "-shared", "-o", linked, *objects, "-lm"])
        # renamed into place: no process loads an incomplete file
        shutil.copyfile(linked, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if "error" in line] or lines  # not the path of includes to them
        raise BuildError(f"{command[0]} failed: {' '.join(errors)[:500]}")


def main() -> int:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return 0
    try:
        for path in build():
            print(f"CPU kernels: {path.name}")
    except BuildError as error:
        print(f"CPU kernels: not compiled: {error}; torch's own will serve, slower", file=sys.stderr)
    return 0


if __name__ == "__main__":  # also runs as a script: this module needs no torch
    sys.exit(main())
