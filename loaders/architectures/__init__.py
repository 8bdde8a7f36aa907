"""The architectures that the compiled forward pass computes, by ``model_type`` of their configuration.

A new one is a function from the ``transformers`` configuration to an ``Architecture``. It refuses every value
that changes the computation in a way that the kernels don't have.
"""

from collections.abc import Callable
from typing import Any

from loaders.architectures.architecture import Architecture, UnsupportedArchitecture
from loaders.architectures.gpt2 import gpt2
from loaders.architectures.gpt_neox import gpt_neox
from loaders.architectures.llama import gemma, llama, mistral, phi3, qwen2, qwen3
from loaders.architectures.opt import opt

__all__ = ["ARCHITECTURES", "Architecture", "UnsupportedArchitecture", "architecture_of"]

ARCHITECTURES: dict[str, Callable[[Any], Architecture]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "gemma": gemma,
    "gpt_neox": gpt_neox,
    "opt": opt,
}


def architecture_of(config: Any) -> Architecture:
    """
    Raises:
        UnsupportedArchitecture: the compiled forward pass can't compute it.
    """
    if (found := ARCHITECTURES.get(config.model_type)) is None:
        raise UnsupportedArchitecture(
            f"the compiled forward pass doesn't have the architecture {config.model_type}"
        )
    try:
        architecture = found(config)
        architecture.shape.check()
    except (ValueError, TypeError, ArithmeticError) as error:  # a configuration may have any values
        raise UnsupportedArchitecture(str(error)) from error
    return architecture
