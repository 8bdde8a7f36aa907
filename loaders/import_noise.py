"""Messages that libraries log, and that a user can do nothing about.

``transformers`` imports torchao if it is installed, whatever is loaded. torchao then names each of its CUDA
libraries that this host can't load, and uses functions of torch that warn. ONNX Runtime's quantizers advise
to optimize a graph first, at the root logger; ours is lowered for them already. On a CPU bitsandbytes warns
at each int8 product that it casts, and recommends a package that downloads native code.
"""

import logging

_NOISE = ("register_constant() on Enum", "pre-processing before quantization")


def silence() -> None:
    for name in ("torchao", "bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_is_useful)
    logging.getLogger().addFilter(_is_useful)  # of what is logged there, not of other loggers


def _is_useful(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in _NOISE)
