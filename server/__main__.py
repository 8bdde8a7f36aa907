"""The ``bitdial`` command: one module of ``server.commands`` per subcommand, imported when it is called."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "serve": "serve a model over HTTP, every precision of it",
    "generate": "continue a prompt in this terminal, in one precision",
    "precisions": "what this host can run, and why not the rest",
    "compare": "one prompt in several precisions, side by side",
    "report": "measure every precision here and say which one to run",
    "quality": "measure what each precision costs in quality",
    "bench": "measure speed and memory of every precision on this host",
}
INTERRUPTED = 130  # what a shell expects of a program ended by Ctrl-C


def usage() -> str:
    commands = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    return (
        "usage: bitdial COMMAND [OPTIONS]\n\n"
        "One causal language model in FP32, 8-bit and 4-bit, chosen per request.\n\n"
        f"commands:\n{commands}\n\n"
        "  bitdial COMMAND --help     the command's options\n"
        "  bitdial --version\n"
    )


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"bitdial {_version()}")
        return 0
    if name not in COMMANDS:
        print(f"bitdial: no command {name!r}\n\n{usage()}", file=sys.stderr, end="")
        return 2
    try:
        return int(import_module(f"server.commands.{name}").main(rest))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `bitdial … | head`
        return 1


def _version() -> str:
    try:
        return version("bitdial")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
