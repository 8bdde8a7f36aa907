"""Renders conversations by the model's chat template, in separate processes."""

import asyncio
import json
import logging
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from server.errors import DeadlinePassed, Invalid, NotReady
from server.service.chat.process import LENGTH

SUBJECT = "the model's chat template "
"""The beginning of every error message about a template."""
_SECONDS = 5.0  # limit of one rendering, which usually takes a fraction of a millisecond
_PROCESSES = 2  # so that one slow rendering doesn't block all others
_MEMORY = 256 * 2**20  # bytes of address space; Python and Jinja need a tenth of it
_ESCAPED = 12  # most bytes of one character in JSON
_KEPT = ("TZ", "LD_LIBRARY_PATH")  # environment variables that are passed on: no key, no token
# sets ``sys.path`` itself, so that no code of site-packages runs at start
_START = "import sys; sys.path[:] = {path!r}; from server.service.chat.process import main; main()"
_ROOT = str(Path(__file__).resolve().parents[3])
_log = logging.getLogger(__name__)


class ChatRenderer:
    """Renders one template in processes that are started on demand. Event loop only.

    Args:
        template: its source.
        variables: its variables besides the messages: the special tokens by name.
        payload_limit: bytes of the largest request body.
        seconds: limit of one rendering, without the wait for a process.
        memory_bytes: memory limit of a process, without the messages.
    """

    def __init__(
        self,
        template: str,
        variables: Mapping[str, Any],
        payload_limit: int,
        *,
        seconds: float = _SECONDS,
        memory_bytes: int = _MEMORY,
    ) -> None:
        self._seconds, self._memory = seconds, memory_bytes + 16 * payload_limit
        self._setup = {
            "template": template,
            "variables": dict(variables),
            "characters": 2**20 + 4 * payload_limit,
            "memory_bytes": self._memory,
            "seconds": seconds,
        }
        self._turns = asyncio.Semaphore(_PROCESSES)
        self._idle: list[_TemplateProcess] = []
        self._alive: set[_TemplateProcess] = set()

    async def render(self, messages: Sequence[Mapping[str, Any]], deadline: float) -> str:
        """The conversation as text, up to the beginning of the assistant's message.

        Args:
            deadline: in ``time.perf_counter()`` seconds.

        Raises:
            Invalid: the template refuses the messages, drops one, fails, or exceeds a limit.
            DeadlinePassed
        """
        return await self._in_turn({"messages": messages}, deadline)

    async def check(self) -> None:
        """Compiles the template.

        Raises:
            Invalid: it can't be compiled.
        """
        await self._in_turn({}, time.perf_counter() + 10 * self._seconds)

    async def stop(self) -> None:
        """Ends the processes."""
        await asyncio.gather(*(process.end() for process in self._alive))

    async def _in_turn(self, order: Mapping[str, Any], deadline: float) -> str:
        try:
            async with asyncio.timeout(deadline - time.perf_counter()), self._turns:
                answer = await self._ask(order)
        except TimeoutError:
            raise DeadlinePassed("the chat template did not render the messages in time") from None
        if "failed" in answer:
            raise _error(answer, self._memory)
        text: str = answer["text"]
        return text

    async def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of an idle process or a new one; a process that doesn't answer is killed."""
        process = await self._process()
        try:
            async with asyncio.timeout(self._seconds):
                answer = await process.ask(order)
        except TimeoutError:
            _log.warning("a chat template was stopped after %g s", self._seconds)
            return {"failed": "time", "seconds": self._seconds}
        except (EOFError, OSError, ValueError) as error:
            _log.warning("the process of a chat template failed (%s)", type(error).__name__)
            return {"failed": "ended"}
        else:
            self._idle.append(process)
            return answer
        finally:
            if process not in self._idle:
                process.kill()

    async def _process(self) -> "_TemplateProcess":
        self._alive = {process for process in self._alive if process.running}
        while self._idle:
            if (process := self._idle.pop()).running:
                return process
        try:
            process = await _TemplateProcess.start(self._setup)
        except OSError as error:
            _log.error("no process for the chat template can be started: %s", error.strerror)
            raise NotReady("no process for the chat template can be started") from None
        self._alive.add(process)
        return process


class _TemplateProcess:
    """A child process that runs ``server.service.chat.process``, connected by two pipes."""

    def __init__(self, process: Process, setup: Mapping[str, Any]) -> None:
        self._process = process
        self._unsent = [setup]
        self._longest = 2**16 + _ESCAPED * setup["characters"]

    @classmethod
    async def start(cls, setup: Mapping[str, Any]) -> "_TemplateProcess":
        """Starts a process that inherits no file, no key and no terminal signal. Raises ``OSError``."""
        path = [folder for folder in (*sys.path, _ROOT) if os.path.isabs(folder)]
        command = [sys.executable, "-I", "-S", "-B", "-c", _START.format(path=path)]
        keep = {name: os.environ[name] for name in _KEPT if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=keep, cwd="/", start_new_session=True
        )
        return cls(process, setup)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises ``EOFError``, ``OSError`` or ``ValueError`` if the process ended or failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for message in (*self._unsent, order):
            body = json.dumps(message).encode()
            self._process.stdin.write(LENGTH.pack(len(body)) + body)
        self._unsent.clear()
        await self._process.stdin.drain()
        (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
        if length > self._longest:
            raise ValueError("too long an answer")
        answer: dict[str, Any] = json.loads(await self._process.stdout.readexactly(length))
        return answer

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> None:
        self.kill()
        await self._process.wait()


def _error(answer: Mapping[str, Any], memory_bytes: int) -> Invalid:
    reason = f": {answer['reason']}" if answer.get("reason") else ""
    match answer["failed"]:
        case "refused":
            text = f"refuses these messages{reason}"
        case "dropped":
            text = f"drops message {answer['index'] + 1}: it has no place there for the role {answer['role']}"
        case "syntax":
            text = f"is not valid: line {answer['line']}{reason}"
        case "length":
            text = "makes too long a text of these messages"
        case "memory":
            text = f"needs more than {memory_bytes // 2**20} MiB for these messages"
        case "time":
            text = f"took longer than {answer['seconds']:g} s for these messages"
        case "fault":
            text = f"fails on these messages ({answer['kind']})"
        case _:
            text = "can't be run on these messages"
    return Invalid(SUBJECT + text, param="inputs")
