"""Which Runner computes a loaded ``transformers`` model."""

from transformers import PreTrainedModel

from loaders import gpt2_runner
from loaders.base import ModelSpec, Runner
from loaders.torch_runner import TorchRunner


def runner_for(model: PreTrainedModel, spec: ModelSpec) -> Runner:
    """The lean one where it knows the architecture and the layers, else ``transformers``' own forward."""
    if gpt2_runner.supports(model):
        return gpt2_runner.GPT2Runner(model, spec)
    return TorchRunner(model, spec)
