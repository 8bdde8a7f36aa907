"""``bitdial cache``: the files that precisions made and keep, and their removal."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.command_line import FAILED, USAGE, UsageError, complain, parse
from server.settings.model import CacheSettings
from server.settings.output import NotSaved, Output, json_option, save
from server.settings.types import ALL, option, parse_names
from server.tables import NONE, aligned
from server.terminal import terminal_width

if TYPE_CHECKING:
    from loaders.artifacts.cache import Entry

_MORE = "more"
_KINDS = {
    "made": "made",
    "trained": "made by training",
    "unfinished": "left over",
    "training": "interrupted training",
    "damaged": "damaged",
}
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


class Options(CacheSettings):
    """List the files that precisions made once and keep: their size, when they
    were used last, and whether a process uses them. Or remove some.

    What is removed is made again when it is needed; training starts anew.
    Downloaded models are in another cache, which hf cache shows.
    """

    remove: str | None = option(
        None,
        _MORE,
        "NAMES",
        "remove these, by comma: a name as listed, a precision for all of its files, or all",
        unset="nothing is removed",
    )
    json_file: Output | None = json_option(_MORE, "write the list there", "nowhere")


def main(arguments: Sequence[str]) -> int:
    try:
        options = parse(Options, "cache", arguments)
        from loaders.artifacts.cache import entries  # late: help and usage must not wait for transformers
        from loaders.artifacts.prepare import default_cache

        root = options.artifacts or default_cache()
        found = entries(root)
        if options.remove is not None:
            return _remove(root, _chosen(found, options.remove))
        save(options.json_file, json.dumps([_as_dict(one) for one in found]))
        print("\n".join(_lines(found, options.artifacts_limit)))
        print(f"in {root}")
    except UsageError as error:
        complain("cache", error)
        return USAGE
    except (NotSaved, OSError) as error:
        complain("cache", error)
        return FAILED
    return 0


def _chosen(found: Sequence["Entry"], names: str) -> list["Entry"]:
    """
    Raises:
        UsageError: a name is that of nothing in the cache.
    """
    wanted = set(parse_names(names))
    if wanted == {ALL}:
        return list(found)
    if missing := sorted(wanted - {one.name for one in found} - {one.method for one in found}):
        raise UsageError(f"--remove: {missing[0][:100]!r} is not in the cache")
    if not wanted:
        raise UsageError("--remove: it names nothing")
    return [one for one in found if wanted & {one.name, one.method}]


def _remove(root: Path, chosen: Sequence["Entry"]) -> int:
    from loaders.artifacts.cache import remove, remove_locks

    kept = [one for one in chosen if not remove(one)]
    remove_locks(root)
    gone = [one for one in chosen if one not in kept]
    print(f"removed {len(gone)}, {_size(sum(one.size for one in gone))}")
    for one in kept:
        complain("cache", RuntimeError(f"{one.name} is in use, or can't be removed"))
    return FAILED if kept else 0


def _lines(found: Sequence["Entry"], limit: int | None) -> list[str]:
    rows = [["name", "model", "size", "last used", "", "in use"]]
    for one in reversed(found):
        rows.append(
            [
                one.name,
                one.model or NONE,
                _size(one.size),
                _ago(time.time() - one.used),
                _KINDS[one.kind],
                "yes" if one.in_use else "no",
            ]
        )
    total = f"{len(found)} in all, {_size(sum(one.size for one in found))}"
    bound = "" if limit is None else f" of {_size(limit)}"
    table = aligned(rows, terminal_width(), left=(0, 1, 4, 5)) if found else []
    return [*table, *([""] if found else []), total + bound]


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _ago(seconds: float) -> str:
    for unit, name in _UNITS:
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return "just now"


def _as_dict(one: "Entry") -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "method": one.method,
        "model": one.model,
        "bytes": one.size,
        "last_used": one.used,
        "in_use": one.in_use,
    }
