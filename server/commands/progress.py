"""Progress on a terminal: a bar for every stage of every load."""

import asyncio
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from server.service.precision_state import LoadProgress

_COUNTED = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
_UNCOUNTED = "{desc} … [{elapsed}]"
_OWN_BARS = "downloading"  # huggingface_hub draws a bar for every file itself
_INTERVAL = 0.1


class ProgressBars:
    """A ``loaders`` progress callback: one bar per stage on a terminal, one line per stage otherwise.

    What follows a colon in a stage, such as the loss of a training, is shown beside its bar.

    Args:
        quiet: without a terminal, no lines: for what takes seconds.
    """

    def __init__(self, title: str, quiet: bool = False) -> None:
        self._title, self._quiet = title, quiet
        self._stage: str | None = None
        self._bar: Any = None

    def __call__(self, stage: str, current: int, total: int) -> None:
        name = stage.partition(":")[0]
        if name != self._stage:
            self.close()
            self._stage = name
            if sys.stderr.isatty() and stage != _OWN_BARS:
                self._bar = tqdm(
                    desc=f"{self._title}: {stage}", leave=False, miniters=1, bar_format=_UNCOUNTED
                )
            elif not self._quiet or stage == _OWN_BARS:
                print(f"{self._title}: {stage} …", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.set_description_str(f"{self._title}: {stage}", refresh=False)
            self._bar.total, self._bar.n = total or None, current
            self._bar.bar_format = _COUNTED if total else _UNCOUNTED
            self._bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


async def show_loading(loading: Callable[[], Mapping[str, LoadProgress]]) -> None:
    """Draws a bar for each precision that is loading, below the log; runs until cancelled.

    Args:
        loading: the progress of each, by its title.
    """
    bars: dict[str, ProgressBars] = {}
    with logging_redirect_tqdm():
        while True:
            now = loading()
            for title in bars.keys() - now.keys():
                bars.pop(title).close()
            for title, progress in now.items():
                bar = bars.setdefault(title, ProgressBars(title))
                bar(progress.stage, progress.current, progress.total)
            await asyncio.sleep(_INTERVAL)
