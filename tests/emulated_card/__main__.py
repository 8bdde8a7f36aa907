"""Runs a command and its child processes as on a host with a GPU.

    python -m tests.emulated_card scripts/gpu_check --quick

Such a run verifies the GPU paths with real numbers and by a card's rules. It does not verify CUDA kernels,
streams, most of the asynchrony, or speed.
"""

import os
import subprocess
import sys

from tests.emulated_card import environment


def main() -> int:
    return subprocess.call(sys.argv[1:], env={**os.environ, **environment()})


sys.exit(main())
