"""Published results of quantization, by the functions of ``scripts/textbook.py``."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from tests import checkpoints

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


@pytest.fixture(scope="module")
def textbook() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "textbook.py")))


def test_bytes_of_gpt2(textbook: SimpleNamespace) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert textbook.parameter_bytes(model) == textbook.GPT2_BYTES == 497_759_232


def test_the_layers_that_bitsandbytes_quantizes(textbook: SimpleNamespace, tmp_path: Path) -> None:
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = [f"transformer.h.{block}.{kind}" for block in range(2) for kind in kinds]
    assert textbook.eight_bit_layers(checkpoints.gpt2(), tmp_path) == expected


def test_dynamic_int8_keeps_the_embeddings(textbook: SimpleNamespace) -> None:
    config = BertConfig(
        num_hidden_layers=1, num_attention_heads=4, hidden_size=256, intermediate_size=1024, vocab_size=4000
    )
    plain = BertForSequenceClassification(config).eval()
    linear = sum(one.weight.numel() for one in plain.modules() if isinstance(one, torch.nn.Linear))
    saved = textbook.file_bytes(plain) - textbook.file_bytes(textbook.dynamic_int8(plain))
    assert saved == pytest.approx(3 * linear, rel=0.02)


@pytest.mark.slow
def test_dynamic_int8_of_bert_has_the_published_size(textbook: SimpleNamespace) -> None:
    plain = BertForSequenceClassification(BertConfig()).eval()
    for name, model in (("fp32", plain), ("int8", textbook.dynamic_int8(plain))):
        assert textbook.file_bytes(model) / 1e6 == pytest.approx(textbook.BERT_MB[name], rel=0.01)


def test_accuracy_size_and_latency_of_precisions(textbook: SimpleNamespace) -> None:
    spec = ModelSpec(open_checkpoint("bundled"), slots=1, context=128)
    found = textbook.precisions(spec, ["fp32", "dynamic-int8"], windows=3, rounds=1, tokens=2)
    assert found["predicted_tokens"] == 3 * 64
    full, quantized = found["precisions"].values()
    assert full["weights_bytes"] > 2 * quantized["weights_bytes"]
    assert 0.2 < full["top1"] < 0.8
    assert quantized["top1"] == pytest.approx(full["top1"], abs=0.05)
    assert min(full["milliseconds_a_token"], quantized["milliseconds_a_token"]) > 0
