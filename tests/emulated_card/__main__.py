"""Runs a command, and all that it starts, as on a host with a card.

    python -m tests.emulated_card scripts/gpu_check --quick

What such a run shows: that the paths for a card do what they should, with real numbers, by a card's rules.
What it can't show is the card's own: its kernels, streams, most of its asynchrony, its speed.
"""

import os
import subprocess
import sys

from tests.emulated_card import environment


def main() -> int:
    return subprocess.call(sys.argv[1:], env={**os.environ, **environment()})


sys.exit(main())
