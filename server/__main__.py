"""The ``bitdial`` command: one module of ``server.commands`` per subcommand, imported when it is called."""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from server.commands import COMMANDS
from server.commands.interrupts import INTERRUPTED, end_at_once
from server.host import threads
from server.version import VERSION


def usage() -> str:
    commands = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    return (
        "usage: bitdial COMMAND [OPTIONS]\n\n"
        "One causal language model in FP32, 8-bit and 4-bit, chosen per request.\n\n"
        f"commands:\n{commands}\n\n"
        "  bitdial COMMAND --help     the command's options\n"
        "  bitdial --version\n\n"
        "exit codes:\n"
        "  0    done\n"
        "  1    failed: the model, the host or the server; one line says why\n"
        "  2    a wrong option, value or prompt\n"
        "  70   serve: a worker died or hung\n"
        "  130  Ctrl-C\n"
    )


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    _exit_on_sigterm()
    threads.limit_libraries()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"bitdial {VERSION}")
        return 0
    if name not in COMMANDS:
        print(f"bitdial: no command {name!r}\n\n{usage()}", file=sys.stderr, end="")
        return 2
    try:
        with end_at_once(f"bitdial {name}: interrupted"):
            _say_start(name, rest)
            return int(import_module(f"server.commands.{name}").main(rest))
    except KeyboardInterrupt:  # from a command that stops other processes first
        print(f"\nbitdial {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `bitdial … | head`
        return 1


def _say_start(name: str, arguments: Sequence[str]) -> None:
    """Prints a line first: importing torch and transformers takes seconds."""
    if sys.stderr.isatty() and not {"-h", "--help"} & set(arguments):
        print(f"bitdial {name}: loading PyTorch …", file=sys.stderr, flush=True)


def _exit_on_sigterm() -> None:
    """Makes process 1 of a container exit on SIGTERM.

    The kernel ignores signals for which process 1 has no handler; while libraries are imported or a model is
    downloaded, only SIGKILL would end it. A listening server installs its own handler.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    sys.exit(main())
