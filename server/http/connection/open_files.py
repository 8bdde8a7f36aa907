"""The limit on open files, and how many connections it allows."""

import contextlib
import resource

MOST_FILES = 65_536
"""The soft limit is raised to this, if the hard limit allows it."""
MOST_CONNECTIONS = 4096
_RESERVE = 96  # models, the report's process and its pipes, connections that end, assets of /docs


def raise_limit() -> int:
    """Raises the soft limit of open files to the hard one, at most ``MOST_FILES``; returns the
    limit in effect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # some systems enforce a lower limit too
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return _soft_limit()


def most_connections(wanted: int | None = None) -> int:
    """The maximum number of connections: ``wanted``, or what the limit of open files allows.

    Raises:
        ValueError: the limit doesn't allow so many.
    """
    files = _soft_limit()
    allowed = files - min(_RESERVE, files // 2)
    if wanted is None:
        return min(allowed, MOST_CONNECTIONS)
    if wanted > allowed:
        raise ValueError(
            f"{wanted} connections need {wanted + _RESERVE} open files; the limit is {files} (ulimit -n)"
        )
    return wanted


def _soft_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
