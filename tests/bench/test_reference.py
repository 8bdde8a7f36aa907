"""What `bitdial bench` compares with: the model as `transformers` alone loads it."""

import pytest
import torch

from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from server.bench.reference import load_reference


def test_int8_on_a_cpu_does_not_warn_at_each_product(caplog: pytest.LogCaptureFixture) -> None:
    model = load_reference("int8", ModelSpec(open_checkpoint("bundled")))
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))
    assert "MatMul8bitLt" not in caplog.text
