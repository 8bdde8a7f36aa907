"""A server's reports: the latest saved one, and new ones measured in a process of low priority."""

import asyncio
import json
import logging
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from loaders.base import Checkpoint
from server.activity import Activity
from server.errors import GenerationFailed, NotReady, Overloaded
from server.host import memory
from server.host.subprocesses import start_command
from server.report import store
from server.report.rows import Row, rows_of
from server.report.subject import REFERENCE, Subject, slots, subject_of
from server.settings.server import ModelSettings

_POLL, _QUIET = 0.02, 0.25  # seconds; the measurement resumes after _QUIET of idleness
_LINE = 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """A saved report."""

    document: Mapping[str, Any]
    folder: Path
    rows: Sequence[Row]


class Reports:
    """Event loop only.

    Args:
        activity: the measuring process is suspended while the server isn't idle, and one measures at a time.
        asked_as: the model's name, if a request has to name it.
    """

    def __init__(
        self,
        settings: ModelSettings,
        checkpoint: Checkpoint,
        activity: Activity | None = None,
        asked_as: str | None = None,
    ) -> None:
        self._settings, self._spec = settings, settings.spec(checkpoint, slots())
        self._asked_as = asked_as
        self._activity = activity or Activity()
        self.subject: Subject | None = None
        self._seen: tuple[Any, Report | None] = (None, None)
        self._process: Process | None = None

    async def find_subject(self) -> None:
        """Sets ``subject``; awaited before any other method is called."""
        self.subject = await asyncio.to_thread(subject_of, self._spec)

    def latest(self) -> Report | None:
        """The report of this subject finished last, by any process; read again when a file has changed."""
        assert self.subject is not None
        stamps = _stamps(store.folder_of(self.subject))
        if self._seen[0] != stamps:
            found = store.latest(self.subject)
            report = None if found is None else Report(*found, rows_of(found[0]))
            self._seen = (stamps, report)
        return self._seen[1]

    def how_to_make_one(self) -> str:
        """The sentence for clients that need a report while there is none."""
        name = self._settings.model_id
        shown = name if "/" not in name and "\\" not in name else "…"  # a path stays private
        if self._spec.checkpoint.model_id == name:
            shown = name
        revision = "" if self._settings.revision is None else f" --revision {self._settings.revision}"
        query = "" if self._asked_as is None else f"?model={quote(self._asked_as)}"
        return (
            "no report of this model on this host yet; make one with "
            f"`bitdial report --model {shown}{revision}` or POST /report{query}"
        )

    async def make(self, options: Mapping[str, Any], text: str | None) -> AsyncGenerator[dict[str, Any]]:
        """Measures in a subprocess and yields its progress events.

        Closing the generator ends the process; the next report continues with the steps it saved.

        Args:
            options: ``server.report.measuring.job.ReportOptions`` without the text.

        Raises:
            Overloaded: another report is being made.
            NotReady: too little free memory for fp32 and another precision beside the loaded ones.
            GenerationFailed: the measurement failed; with the reason.
        """
        self._reserve(options["precisions"])
        try:
            process = self._process = await self._start(options, text)
        except BaseException:
            self._activity.measuring = False
            raise
        pausing = asyncio.create_task(self._pause_while_busy(process))
        try:
            yield {"status": "starting"}
            async for event in self._events(process):
                yield event
        finally:
            pausing.cancel()
            if self._process is process:  # no other report has been started since
                self.abandon()
            await _kill_and_wait(process)

    def _reserve(self, precisions: Sequence[str]) -> None:
        if self._activity.measuring:
            raise Overloaded("a report is being made already")
        others = [memory.needed_bytes(name, self._spec) for name in precisions if name != REFERENCE]
        needed = memory.needed_bytes(REFERENCE, self._spec) + max(others, default=0)
        free = memory.free_bytes(self._spec.device)
        if needed > free:
            raise NotReady(
                f"no room to measure: it needs {needed} bytes beside what is loaded, {free} are free"
            )
        self._activity.measuring = True

    async def _start(self, options: Mapping[str, Any], text: str | None) -> Process:
        command = start_command("server.report.measuring.child", sys.executable)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=_LINE
        )
        settings = self._settings.model_dump(mode="json", include=set(ModelSettings.model_fields))
        settings["threads"] = self._spec.threads  # the server's number, not the subprocess's default
        job = {"settings": settings, "options": dict(options), "text": text}
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            with suppress(ConnectionError):
                await process.stdin.drain()
        except BaseException:
            _kill(process)
            raise
        return process

    async def _events(self, process: Process) -> AsyncIterator[dict[str, Any]]:
        assert process.stdout is not None
        async for line in process.stdout:
            event = json.loads(line)
            if "error" in event:
                raise GenerationFailed(f"the report could not be made: {event['error']}")
            if "kept" in event:
                return
            yield event
        status = await process.wait()
        _log.error("the process that made a report ended with status %d", status)
        raise GenerationFailed("the report could not be made: its process ended; what it measured is kept")

    async def _pause_while_busy(self, process: Process) -> None:
        """Suspends the process while the server is busy, so that requests have all CPU cores."""
        with suppress(psutil.Error):
            target, stopped, quiet_since = psutil.Process(process.pid), False, 0.0
            while process.returncode is None:
                now = time.monotonic()
                if not self._activity.is_idle():
                    quiet_since = now
                    if not stopped:
                        target.suspend()
                        stopped = True
                elif stopped and now - quiet_since > _QUIET:
                    target.resume()
                    stopped = False
                await asyncio.sleep(_POLL)

    def abandon(self) -> None:
        """Kills the measuring process without waiting for it; another report can be started at once."""
        if self._process is not None:
            _kill(self._process)
            self._activity.measuring, self._process = False, None

    async def stop(self) -> None:
        """Kills the measuring process and waits for its end."""
        if self._process is not None:
            await _kill_and_wait(self._process)


def _kill(process: Process) -> None:
    """Kills a running or suspended process; the steps it finished are saved."""
    with suppress(ProcessLookupError):
        process.kill()


async def _kill_and_wait(process: Process) -> None:
    _kill(process)
    await process.wait()


def _stamps(folder: Path) -> Any:
    """A value that changes with the reports in the folder; None if the folder can't be read."""
    try:
        return sorted((one.name, (one / store.NAME).stat().st_mtime_ns) for one in folder.iterdir())
    except OSError:
        return None
