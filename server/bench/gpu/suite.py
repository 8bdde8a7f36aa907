"""Runs the GPU tests by pytest in a subprocess, without plugins."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec

from server.host.subprocesses import ROOT

FOLDER = "tests/gpu"
COMMAND = [
    sys.executable, "-m", "pytest", FOLDER, "-m", "gpu", "-rfE", "--tb=short",
    "-p", "no:cacheprovider", f"--confcutdir={FOLDER}",
]  # fmt: skip
"""Without the other folders' fixtures, which need the server's packages."""


@dataclass(frozen=True)
class Suite:
    """Result of pytest."""

    status: int | None
    """Its exit status; None after a timeout."""
    counts: dict[str, int] = field(default_factory=dict)
    """By outcome: passed, failed, skipped, error."""
    failed: list[str] = field(default_factory=list)
    """Names and first lines of failed tests."""

    def faults(self) -> list[str]:
        if self.status is None:
            return ["the tests did not end in time"]
        if self.status not in (0, 5):  # 5: there was none to run
            return self.failed or [f"pytest ended with status {self.status}"]
        return []


def run(seconds: float) -> Suite | str:
    """The result, or the reason for skipping."""
    if find_spec("pytest") is None:
        return "pytest is not installed"
    if not (ROOT / FOLDER).is_dir():
        return f"{FOLDER} is not here: it is part of a checkout"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    try:
        done = subprocess.run(
            COMMAND, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as stopped:
        return read(None, stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else "")
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    return read(done.returncode, done.stdout)


def read(status: int | None, output: str) -> Suite:
    """Parses pytest's output."""
    last = output.strip().splitlines()[-1:] or [""]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last[0])}
    return Suite(status, counts, re.findall(r"^(?:FAILED|ERROR) (.*)", output, re.M))
