"""The ``Retry-After`` header of a refused request."""

import math
import random
from collections.abc import Callable

from server.errors import ServiceError

MOST_SECONDS = 60


def retry_after(error: ServiceError, uniform: Callable[[], float] = random.random) -> int | None:
    """Whole seconds from 1 to 60, None if a retry can't succeed.

    Spread over ``retry_spread`` seconds, so that clients refused together don't retry together.

    Args:
        error: the error in the response.
        uniform: returns random numbers in [0, 1).
    """
    if error.retry_after is None:
        return None
    least = min(math.ceil(error.retry_after), MOST_SECONDS // 2)
    most = min(least + math.ceil(error.retry_spread), MOST_SECONDS)
    return max(1, least + int(uniform() * (most - least + 1)))
