"""A GPU emulated on the host; ``tests.emulated_card.dispatch`` documents its rules."""

import os
from pathlib import Path

_HERE, _SIGN = Path(__file__).parent, "EMULATED_CARD"


def is_there() -> bool:
    """Whether this process has an emulated card."""
    return os.environ.get(_SIGN) == "1"


def environment() -> dict[str, str]:
    """Environment variables with which Python processes start with the card."""
    paths = [str(_HERE / "site"), str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        _SIGN: "1",
        "OMP_NUM_THREADS": "1",  # operations are small here, and threads cost more than they gain
        "TORCHDYNAMO_DISABLE": "1",  # compiled code would bypass the emulation
    }
