#!/usr/bin/env python3
"""``bitdial bench`` from a checkout; docs/benchmarks.md explains it.

.venv/bin/python scripts/bench.py [--model MODEL] [--precisions fp32,int8,…] [--peers] [--http] …
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from server.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
