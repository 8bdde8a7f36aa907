"""The subcommands: one module each, imported when it is called, since PyTorch takes seconds to import."""

COMMANDS = {
    "serve": "serve a model over HTTP, every precision of it",
    "chat": "talk with the model in this terminal, precisions changed as you go",
    "generate": "continue a prompt in this terminal, in one precision",
    "precisions": "what this host can run, and why not the rest",
    "quantize": "make a precision's files once, and save them",
    "cache": "the files that were made once: list them, remove some",
    "compare": "one prompt in several precisions, side by side",
    "report": "measure every precision here and say which one to run",
    "quality": "measure what each precision costs in quality",
    "explain": "show what quantization does to a layer's weights",
    "bench": "measure speed and memory of every precision on this host",
    "plan": "how many replicas serve a workload, in which precision",
    "completion": "a script that completes commands and options in your shell",
}
"""What each does, in the order of ``bitdial --help``."""
