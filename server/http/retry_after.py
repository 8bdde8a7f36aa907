"""When a refused client should come back."""

import math
import random
from collections.abc import Callable

from server.errors import ServiceError

MOST_SECONDS = 60


def retry_after(error: ServiceError, uniform: Callable[[], float] = random.random) -> int | None:
    """Whole seconds for the header ``Retry-After``, from 1 to 60; None where trying again is no use.

    Spread over ``retry_spread`` seconds, so that clients which were refused together don't return together.

    Args:
        error: what the client is answered.
        uniform: random numbers from 0 to below 1.
    """
    if error.retry_after is None:
        return None
    least = min(math.ceil(error.retry_after), MOST_SECONDS // 2)
    most = min(least + math.ceil(error.retry_spread), MOST_SECONDS)
    return max(1, least + int(uniform() * (most - least + 1)))
