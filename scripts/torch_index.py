"""Chooses the index of torch's wheel for this host; scripts/install runs it before any package is installed.

Prints the index's address, or an empty line for the ordinary index, and says on standard error which and why.
"""

import os
import platform
import shutil
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5


class Choice(NamedTuple):
    address: str
    """Empty: the ordinary index."""
    reason: str


def choose(environment: Mapping[str, str], cpu_builds: str = CPU_BUILDS, root: Path = Path("/")) -> Choice:
    """The index for this host.

    Args:
        environment: ``TORCH_INDEX_URL`` decides, even if it is empty.
        cpu_builds: the index of torch's builds without CUDA.
        root: the folder of ``/proc`` and ``/dev``.
    """
    if (named := environment.get("TORCH_INDEX_URL")) is not None:
        return Choice(named, f"torch from {named or 'the ordinary index'}, as TORCH_INDEX_URL says")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return Choice("", "torch from the ordinary index, which has the build for this platform")
    if card := nvidia_card(root, environment.get("PATH")):
        return Choice("", f"torch with CUDA from the ordinary index: this host has an NVIDIA card ({card})")
    if fault := probe(f"{cpu_builds}/torch/"):
        ordinary = "torch from the ordinary index, perhaps gigabytes with CUDA"
        return Choice("", f"{ordinary}: {cpu_builds} can't be reached ({fault})")
    return Choice(cpu_builds, f"torch without CUDA from {cpu_builds}: this host has no NVIDIA card")


def nvidia_card(root: Path, path: str | None) -> str | None:
    """What shows that there is an NVIDIA card: a file of the driver, or its command; None without."""
    for file in ("proc/driver/nvidia", "dev/nvidia0"):
        if (root / file).exists():
            return f"/{file}"
    return shutil.which("nvidia-smi", path=path)


def probe(address: str) -> str | None:
    """Why the page can't be read, or None if it can."""
    try:
        urllib.request.urlopen(address, timeout=PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


if __name__ == "__main__":
    choice = choose(os.environ)
    print(choice.reason, file=sys.stderr)
    print(choice.address)
