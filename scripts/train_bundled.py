#!/usr/bin/env python3
"""Trains the bundled model: a small GPT-2 on the text that comes with CPython.

    .venv/bin/python scripts/train_bundled.py [--steps N] [--bf16] [--work DIR] [--out loaders/bundled]

Seeded and resumable: every batch is drawn from (seed, step), and checkpoints go to ``--work``, so that an
interrupted run continues where it stopped. The learning rate has warm-up, plateau and decay
(the last quarter of ``--steps``): before the decay begins, ``--steps`` may be changed on resuming.
Muon trains the layers' matrices (Jordan et al. 2024, scaled as in arXiv:2502.16982), AdamW the rest.
Writes config, tokenizer, safetensors and a model card with the figures measured on held-out text.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ngram import KneserNey

from loaders.texts import corpus

END = "<|endoftext|>"
CONFIG: dict[str, Any] = {
    "vocab_size": 2048, "n_positions": 512, "n_embd": 192, "n_layer": 5, "n_head": 3,
    "bos_token_id": 0, "eos_token_id": 0,
    "activation_function": "gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0,  # until the learning rate decays
}  # fmt: skip
BATCH, LENGTH = 8, 512
PROSE_SHARE = 0.75  # of each batch: help topics and docstrings; the rest is library source
ADAMW_LR, MUON_LR, WEIGHT_DECAY = 3e-3, 6e-3, 0.1
WARMUP, DECAY_SHARE = 150, 0.25


def train_tokenizer(documents: list[corpus.Document]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prose = (d.text for d in documents if d.kind != "source")
    tokenizer.train_from_iterator(prose, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        unk_token=END,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray[Any, Any]:
    """All texts as one array of token ids, each ended by the end token."""
    ids = [token for text in texts for token in [*tokenizer(text, verbose=False)["input_ids"], 0]]
    return np.array(ids, dtype=np.int64)


def batch_for(step: int, prose: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> torch.Tensor:
    """The (BATCH, LENGTH + 1) token ids of one step, a function of the step alone."""
    draw = np.random.default_rng((20261123, step))
    rows = []
    for _ in range(BATCH):
        ids = prose if draw.random() < PROSE_SHARE else source
        start = int(draw.integers(0, len(ids) - LENGTH - 1))
        rows.append(ids[start : start + LENGTH + 1])
    return torch.from_numpy(np.stack(rows))


def schedule(step: int, steps: int) -> float:
    """The share of the full learning rate at a step."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    if step < (start := decay_start(steps)):
        return 1.0
    return max(0.02, (steps - step) / (steps - start))


def decay_start(steps: int) -> float:
    """The step at which the learning rate begins to fall."""
    return steps * (1 - DECAY_SHARE)


class Optimizers:
    """Muon and AdamW behind one interface."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self._parameters = list(model.parameters())
        layers = {id(p) for p in model.transformer.h.parameters() if p.dim() == 2}
        matrices = [p for p in self._parameters if id(p) in layers]
        embeddings = [p for p in self._parameters if p.dim() == 2 and id(p) not in layers]
        vectors = [p for p in self._parameters if p.dim() < 2]
        groups = [
            {"params": embeddings, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._all: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(
                    matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
                ),
                MUON_LR,
            ),
            (torch.optim.AdamW(groups, lr=ADAMW_LR, betas=(0.9, 0.95), fused=True), ADAMW_LR),
        ]

    def step(self, share: float) -> None:
        """One update at that share of the learning rates."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, rate in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self._all]

    def restore(self, states: list[dict[str, Any]]) -> None:
        for (optimizer, _), state in zip(self._all, states, strict=True):
            optimizer.load_state_dict(state)


@torch.no_grad()
def held_out_nats(model: GPT2LMHeadModel, ids: np.ndarray[Any, Any]) -> float:
    """Total negative log-likelihood (nats), windows of LENGTH at stride LENGTH / 2, first token free."""
    model.eval()
    total, done, stride = 0.0, 1, LENGTH // 2
    for start in range(0, len(ids) - 1, stride):
        window = torch.from_numpy(ids[start : start + LENGTH])[None]
        end = start + window.shape[1]
        logits = model(window).logits[0, :-1].float()
        losses = functional.cross_entropy(logits, window[0, 1:], reduction="none")
        total += float(losses[-(end - done) :].sum()) if end > done else 0.0
        done = max(done, end)
        if end == len(ids):
            break
    model.train()
    return total


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(20261123)
    args.work.mkdir(parents=True, exist_ok=True)
    documents = corpus.training_documents()
    tokenizer_path = args.work / "tokenizer"
    if not tokenizer_path.exists():
        train_tokenizer(documents).save_pretrained(tokenizer_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    prose = encode(tokenizer, [d.text for d in documents if d.kind != "source"])
    source = encode(tokenizer, [d.text for d in documents if d.kind == "source"])
    held_out = encode(tokenizer, [corpus.held_out_text()])

    model = GPT2LMHeadModel(GPT2Config(**CONFIG))
    optimizers = Optimizers(model)
    first = restore(args.work, model, optimizers)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters; tokens: prose {len(prose):,}, source {len(source):,}, "
          f"held out {len(held_out):,}; steps {first}…{args.steps}")  # fmt: skip

    model.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", mininterval=5)
    for step in bar:
        if step >= decay_start(args.steps):  # no dropout while the learning rate decays
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        loss = loss_of(model, batch_for(step, prose, source), args.bf16)
        loss.backward()
        optimizers.step(schedule(step, args.steps))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.work, model, optimizers, step + 1)
            nats = held_out_nats(model, held_out) / (len(held_out) - 1)
            tqdm.write(
                f"{time.strftime('%H:%M:%S')} step {step + 1}: held-out perplexity {math.exp(nats):.3f}"
            )
    export(args.out, model, tokenizer, prose, source, held_out, args.steps)


def loss_of(model: GPT2LMHeadModel, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean cross-entropy (nats) of (BATCH, LENGTH + 1) ids, each predicted from those before it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def restore(work: Path, model: GPT2LMHeadModel, optimizers: Optimizers) -> int:
    """Restores a saved state; returns the next step, 0 without one."""
    if not (path := work / "state.pt").exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.restore(state["optimizers"])
    return int(state["step"])


def save(work: Path, model: GPT2LMHeadModel, optimizers: Optimizers, step: int) -> None:
    state = {"model": model.state_dict(), "optimizers": optimizers.state(), "step": step}
    torch.save(state, work / "state.new")
    (work / "state.new").replace(work / "state.pt")


def export(
    out: Path,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    prose: np.ndarray[Any, Any],
    source: np.ndarray[Any, Any],
    held_out: np.ndarray[Any, Any],
    steps: int,
) -> None:
    """Writes the checkpoint and its card; every figure on the card is measured here."""
    model.config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "activation_function": "gelu_new"})
    model.generation_config.update(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = len(corpus.held_out_text().encode())
    predicted = len(held_out) - 1
    figures = {"this model": held_out_nats(model, held_out)}
    for order in (3, 5):
        baseline = KneserNey(list(itertools.chain(source, prose)), order, CONFIG["vocab_size"])
        figures[f"Kneser-Ney {order}-gram"] = baseline.nats(held_out.tolist())
    rows = "\n".join(
        f"| {name} | {nats / math.log(2) / size:.3f} | {math.exp(nats / predicted):.2f} |"
        for name, nats in figures.items()
    )
    template = (Path(__file__).parent / "bundled_card.md").read_text()
    card = template.format(
        rows=rows,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=steps,
        tokens=steps * BATCH * LENGTH,
        prose=len(prose),
        source=len(source),
        held_out=len(held_out),
        held_out_bytes=size,
        python=platform.python_version(),
        **{k: CONFIG[k] for k in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")},
    )
    (out / "README.md").write_text(card)
    print(json.dumps({name: math.exp(nats / predicted) for name, nats in figures.items()}))


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16, on a CPU that supports it")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--work", type=Path, default=root / ".train")
    parser.add_argument("--out", type=Path, default=root / "loaders" / "bundled")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
