"""The process that runs a model's chat template: it reads orders and writes answers, each a length and JSON.

A template is a program by the model's author. This process limits its memory and forbids it to write files.
The server kills the process when a rendering takes too long; if the server is gone, a timer ends it.
"""

import json
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO

from jinja2 import TemplateSyntaxError

from server.service.chat.template import ChatTemplate, RoleDropped, TemplateRefusal, TooLong

LENGTH = struct.Struct(">I")
"""The length that precedes every message."""
_PATIENCE = 1.5  # times the server's own limit, so that the timer fires only without a server
_LONGEST_REFUSAL = 300  # characters


def main() -> None:
    """Reads ``{"template", "variables", "characters", "memory_bytes", "seconds"}``, then orders until EOF.

    An order ``{"messages"}`` is answered by ``{"text"}`` or ``{"failed", …}``; ``{}`` compiles only.
    """
    setup = _receive(sys.stdin.buffer)
    if setup is None:
        return
    _limit(resource.RLIMIT_AS, setup["memory_bytes"])
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    template = None
    while (order := _receive(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE * setup["seconds"])
        try:
            template = template or _compile(setup)
            answer = {"text": template.render(order["messages"]) if order else ""}
        except Exception as error:
            answer = _failure(error, setup["template"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(sys.stdout.buffer, answer)


def _compile(setup: Mapping[str, Any]) -> ChatTemplate:
    return ChatTemplate(setup["template"], setup["variables"], setup["characters"])


def _failure(error: Exception, source: str) -> dict[str, Any]:
    match error:
        case TemplateRefusal():
            # only text from the template is passed on; anything else may be part of the messages
            reason = str(error)[:_LONGEST_REFUSAL]
            return {
                "failed": "refused",
                "reason": reason if reason.isprintable() and reason in source else "",
            }
        case RoleDropped():
            return {"failed": "dropped", "index": error.index, "role": error.role}
        case TemplateSyntaxError():
            return {"failed": "syntax", "line": error.lineno, "reason": str(error.message)[:_LONGEST_REFUSAL]}
        case TooLong():
            return {"failed": "length"}
        case MemoryError():
            return {"failed": "memory"}
    return {"failed": "fault", "kind": type(error).__name__}


def _receive(stream: BinaryIO) -> Any:
    """The next message; None at end of file."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = stream.read(LENGTH.unpack(head)[0])
    return json.loads(body)


def _send(stream: BinaryIO, message: Any) -> None:
    body = json.dumps(message).encode()
    with suppress(BrokenPipeError):
        stream.write(LENGTH.pack(len(body)) + body)
        stream.flush()


def _limit(kind: int, most: int) -> None:
    with suppress(ValueError, OSError):  # the system lacks this limit, or has a lower one
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
