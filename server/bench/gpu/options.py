"""Options of the check, and the sizes that follow from them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.bench.gpu.models import GPT2, GPT2_XL, TINY, TINY_XL, Shape

PARTS = ("tests", "correctness", "speed", "kernels", "continuous", "http", "xl", "steady", "compile")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4", "fp4")
SECONDS = 465.0  # with the time that Python takes to start, eight minutes


@dataclass(frozen=True)
class Sizes:
    """Sizes of models and runs."""

    small: Shape
    large: Shape
    batches: tuple[int, ...]
    large_batches: tuple[int, ...]
    large_context: int
    prompt: int
    tokens: int
    large_tokens: int
    repeat: int
    slots: int
    """Of the correctness check, and of a server's default settings."""
    streams: tuple[int, ...]
    """Of the closed loops over HTTP."""
    load_seconds: float
    """Duration of each closed loop."""


FULL = Sizes(GPT2, GPT2_XL, (1, 8, 32, 64), (1, 64), 512, 32, 128, 48, 2, 16, (1, 16, 64), 4.0)
QUICK = Sizes(TINY, TINY_XL, (1, 3), (2,), 128, 8, 160, 96, 1, 4, (1, 3), 0.3)
"""Enough tokens that a tiny model's rows overlap: the first must not end before the last begins."""


@dataclass(frozen=True)
class Options:
    """Parsed options."""

    model: str | None
    out: Path | None
    device: str
    quick: bool
    seconds: float
    tokenizer: Path | None
    parts: tuple[str, ...]
    precisions: tuple[str, ...]

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else FULL


def parse(arguments: Sequence[str]) -> Options:
    """Exits with a message if they are invalid."""
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description="Check and measure this project on a GPU, in one go and without a network; docs/gpu.md "
        "explains the figures.",
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="hub id or folder; a full-size GPT-2 with random weights if none",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the figures go; docs/results/gpu-<card>-<date>.json if none",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="GPT-2's own, for the made models; a stand-in if none",
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal of the check itself")
    add("--quick", action="store_true", help="tiny models and few tokens")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="N",
        help="time limit; what doesn't fit is skipped",
    )
    add("--parts", type=_some(PARTS), default=PARTS, metavar="NAMES", help=f"of {','.join(PARTS)}")
    add(
        "--precisions",
        type=_some(PRECISIONS),
        default=PRECISIONS,
        metavar="NAMES",
        help=f"of {','.join(PRECISIONS)}",
    )
    return Options(**vars(parser.parse_args(arguments)))


def _some(choices: Sequence[str]) -> "_Names":
    return _Names(tuple(choices))


@dataclass(frozen=True)
class _Names:
    """Parses names separated by commas."""

    choices: tuple[str, ...]

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name)
        if unknown := [name for name in names if name not in self.choices]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(self.choices)}")
        return names
