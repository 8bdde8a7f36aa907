"""Messages that libraries log while they are imported, and that a user can do nothing about.

``transformers`` imports torchao if it is installed, whatever is loaded. torchao then names each of its CUDA
libraries that this host can't load, and uses functions of torch that warn.
"""

import logging


def silence() -> None:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return "register_constant() on Enum" not in record.getMessage()
