"""What the converter's process reports, line by line on its standard output."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loaders.errors import LoaderError, in_short

PROGRESS, ERROR = "bitdial-progress ", "bitdial-error "


def tell(stage: str, current: int, total: int) -> None:
    """Reports progress, as a ``Progress`` callback."""
    print(PROGRESS + json.dumps([stage, current, total]), flush=True)


@contextmanager
def reported() -> Iterator[None]:
    """Reports an exception as one line and exits with code 1."""
    try:
        yield
    except LoaderError as error:
        _exit(str(error))
    except Exception as error:
        import traceback

        traceback.print_exc()
        _exit(in_short(error))


def _exit(message: str) -> None:
    print(ERROR + json.dumps(message), flush=True)
    sys.exit(1)
