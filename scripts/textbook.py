#!/usr/bin/env python3
"""Reproduces results that textbooks and tutorials of quantization publish, on this host.

    .venv/bin/python scripts/textbook.py [--out docs/results] [--precisions fp32,int8,dynamic-int8]

Writes textbook-DATE.md and .json. Weights are random where only bytes, layers and speed are shown: they don't
depend on the values.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from textbook_document import Figures, markdown
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.texts import TokenStream, held_out
from server.host.cpu import cpu_name
from server.host.threads import compute_with, default_threads

GPT2_BYTES = 497_759_232
BERT_MB = {"fp32": 438.0, "int8": 181.4}  # PyTorch's tutorial "Dynamic Quantization on BERT"


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters; those of a tied head count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def eight_bit_layers(model: GPT2LMHeadModel, folder: Path) -> list[str]:
    """The ``Linear8bitLt`` layers of the model after ``from_pretrained(load_in_8bit=True)``."""
    model.save_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    return [name for name, one in loaded.named_modules() if type(one).__name__ == "Linear8bitLt"]


def gpt2() -> Figures:
    """Bytes of GPT-2 small in float32, and which of its layers bitsandbytes quantizes."""
    model = GPT2LMHeadModel(GPT2Config())
    with tempfile.TemporaryDirectory() as folder:
        layers = eight_bit_layers(model, Path(folder))
    return {"fp32_bytes": parameter_bytes(model), "published_bytes": GPT2_BYTES, "linear8bitlt": layers}


def dynamic_int8(model: nn.Module) -> nn.Module:
    """PyTorch's own dynamic quantization of every ``nn.Linear``, as in its tutorial."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces torchao as its successor
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantized


def file_bytes(model: nn.Module) -> int:
    """Size of the saved ``state_dict``, which the tutorial prints as the model's."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model.state_dict(), path := Path(folder) / "model.pt")
        return path.stat().st_size


def bert(rounds: int, length: int = 128) -> Figures:
    """A BERT-base in float32 and in dynamic int8: file sizes, and milliseconds of one text on one thread."""
    torch.manual_seed(0)
    plain = BertForSequenceClassification(BertConfig()).eval()
    models = {"fp32": plain, "int8": dynamic_int8(plain)}
    ids = torch.randint(1000, 30_000, (1, length))
    compute_with(1)
    with torch.inference_mode():
        times = alternated({name: lambda one=one: one(ids) for name, one in models.items()}, rounds)  # type: ignore[misc]
    milliseconds = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    return {
        "megabytes": {name: file_bytes(model) / 1e6 for name, model in models.items()},
        "published_megabytes": BERT_MB,
        "tokens": length,
        "milliseconds": milliseconds,
        "speed_up": statistics.median(
            one / other for one, other in zip(times["fp32"], times["int8"], strict=True)
        ),
    }


def alternated(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, in turn; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for at in tqdm(range(rounds + 1), desc=", ".join(works), leave=False):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if at:
                times[name].append(time.perf_counter() - started)
    return times


def accuracy(model: LoadedModel, windows: Sequence[Sequence[int]]) -> float:
    """Fraction of tokens that the model predicts: its most probable token is the next one.

    Counted in the second half of each window, where the context is at least half a window.
    """
    right = total = 0
    for ids in windows:
        kept = len(ids) // 2
        (logits,) = model.runner.score_together([ids[:-1]], kept)
        right += int((logits.argmax(-1).cpu() == torch.tensor(ids[-kept:])).sum())
        total += kept
    return right / total


def held_out_windows(spec: ModelSpec, windows: int) -> list[list[int]]:
    """Windows of the model's context from the start of the held-out text, overlapping by half."""
    tokenizer = load_tokenizer(spec.checkpoint)
    length = spec.max_tokens
    stream = iter(TokenStream(held_out(), tokenizer, spec.checkpoint.vocabulary))
    ids = list(islice(stream, length * (windows + 1) // 2))
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, length // 2)][:windows]


def decoding(model: LoadedModel, prompt: Sequence[int], tokens: int) -> Callable[[], object]:
    """Decodes so many tokens after a prompt, at one row."""

    def decode() -> Tensor:
        model.runner.free(0)
        logits = model.runner.prefill(0, prompt)
        assert logits is not None
        for _ in range(tokens):
            logits = model.runner.decode([0], [int(logits[-1].argmax())])
        return logits

    return decode


def precisions(spec: ModelSpec, names: Sequence[str], windows: int, rounds: int, tokens: int = 64) -> Figures:
    """Next-token top-1 accuracy on held-out text, bytes and latency of each precision, all in one run."""
    compute_with(spec.threads or default_threads())
    texts = held_out_windows(spec, windows)
    models = {name: loaders.load(name, spec) for name in names}
    found: Figures = {
        name: {
            "top1": accuracy(model, texts),
            "weights_bytes": model.footprint.weights_bytes,
            "bits_per_weight": model.footprint.bits_per_weight,
        }
        for name, model in models.items()
    }
    times = alternated(
        {name: decoding(model, texts[0][:32], tokens) for name, model in models.items()}, rounds
    )
    for name, seconds in times.items():
        found[name]["milliseconds_a_token"] = 1e3 * statistics.median(seconds) / tokens
        models[name].close()
    predicted = sum(len(text) // 2 for text in texts)
    return {"model": spec.checkpoint.model_id, "predicted_tokens": predicted, "precisions": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--precisions", default="fp32,int8,dynamic-int8", help="by comma")
    parser.add_argument("--windows", type=int, default=40, help="of held-out text")
    parser.add_argument("--rounds", type=int, default=9, help="of each measurement of time")
    options = parser.parse_args()
    threads = default_threads()
    spec = ModelSpec(open_checkpoint(options.model), slots=1, threads=threads)
    found: Figures = {
        "date": f"{date.today():%Y-%m-%d}",
        "cpu": cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "gpt2": gpt2(),
        "bert": bert(options.rounds),
    }
    gc.collect()
    found["own"] = precisions(spec, options.precisions.split(","), options.windows, options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(found, indent=1)), (".md", markdown(found))):
        (options.out / f"textbook-{found['date']}{suffix}").write_text(text + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
