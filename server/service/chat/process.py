"""The process in which a model's chat template runs: an order in, an answer out, each a length and JSON.

A template is a program of the model's author. Here it has little memory and writes no files, and the server
ends the process when its time is up; should the server itself be gone, a timer does.
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
"""Stands before every message."""
_PATIENCE = 1.5  # times as long as the server, which has ended the process by then if it is there
_LONGEST_REFUSAL = 300  # characters


def main() -> None:
    """Reads ``{"template", "variables", "characters", "memory_bytes", "seconds"}``, then orders to the end.

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
            # what stands in the template is its author's word; anything else may be part of the messages
            said = str(error)[:_LONGEST_REFUSAL]
            return {"failed": "refused", "said": said if said.isprintable() and said in source else ""}
        case RoleDropped():
            return {"failed": "dropped", "index": error.index, "role": error.role}
        case TemplateSyntaxError():
            return {"failed": "syntax", "line": error.lineno, "said": str(error.message)[:_LONGEST_REFUSAL]}
        case TooLong():
            return {"failed": "length"}
        case MemoryError():
            return {"failed": "memory"}
    return {"failed": "fault", "kind": type(error).__name__}


def _receive(stream: BinaryIO) -> Any:
    """The next message; None where there will be none."""
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
    with suppress(ValueError, OSError):  # a system without it, or an even lower limit
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
