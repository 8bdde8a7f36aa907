"""A card that is emulated on the host: ``tests.emulated_card.dispatch`` says what that means."""

import os
from pathlib import Path

_HERE, _SIGN = Path(__file__).parent, "EMULATED_CARD"


def is_there() -> bool:
    """Whether this process has one."""
    return os.environ.get(_SIGN) == "1"


def environment() -> dict[str, str]:
    """What makes Python processes begin with the card."""
    paths = [str(_HERE / "site"), str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        _SIGN: "1",
        "OMP_NUM_THREADS": "1",  # a card's operations are small here, and threads cost more than they bring
        "TORCHDYNAMO_DISABLE": "1",  # what is compiled for a card would not come by here
    }
