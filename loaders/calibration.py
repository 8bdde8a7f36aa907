"""Token ids of the calibration text, for a model's tokenizer."""

from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from loaders.base import ModelSpec
from loaders.checkpoint import load_tokenizer
from loaders.texts import Text, TextError, TokenStream
from loaders.texts.calibration import CalibrationError, calibration_text

_MOST, _STRETCHES = 2 << 20, 64  # bytes of a text that are encoded, and the parts of a longer one
_LEAST = 2  # tokens of a sample


def calibration_samples(spec: ModelSpec, samples: int, length: int) -> Tensor:
    """(samples, length) int64 token ids, spread evenly over the calibration text; the same for every call.

    Args:
        samples: at most; of a short text as many as it has.
        length: tokens of a sample; capped at ``spec.max_tokens``.

    Raises:
        CalibrationError: the text has too few tokens for a single sample, or none that the model knows.
        CheckpointError: the model has no usable tokenizer.
    """
    tokenizer, checkpoint = load_tokenizer(spec.checkpoint), spec.checkpoint
    length = min(length, spec.max_tokens)
    text = calibration_text(spec.calibration)
    try:
        ids = list(_spread(text, tokenizer, checkpoint.vocabulary))
    except (TextError, OSError) as error:
        raise CalibrationError(f"the calibration text can't be used: {error}") from error
    unknown = getattr(tokenizer, "unk_token_id", None)
    known = len(ids) if unknown is None else sum(one != unknown for one in ids)
    if len(ids) < max(length, _LEAST):
        raise CalibrationError(
            f"the calibration text {text.name} has {len(ids)} tokens; {length} are the fewest"
        )
    if 2 * known < len(ids):
        raise CalibrationError(
            f"the model's tokenizer knows only {known} of the {len(ids)} tokens of the calibration text "
            f"{text.name}: calibrate on a text in its language"
        )
    count = min(samples, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.tensor(ids)[starts[:, None] + torch.arange(length)]


def _spread(text: Text, tokenizer: Any, vocabulary: int) -> Iterator[int]:
    """Tokens of the text; of a long one, those of stretches that are spread over it."""
    stretches = [text] if text.size <= _MOST else [_stretch(text, at) for at in range(_STRETCHES)]
    return chain.from_iterable(TokenStream(one, tokenizer, vocabulary=vocabulary) for one in stretches)


def _stretch(text: Text, number: int) -> Text:
    """One of ``_STRETCHES`` parts of equal size, cut at spaces."""
    size = _MOST // _STRETCHES
    with text.open() as stream:
        stream.seek(number * (text.size - size) // (_STRETCHES - 1))
        data = stream.read(size)
    whole = data.partition(b" ")[2].rpartition(b" ")[0]
    return Text(text.name, len(whole), lambda: BytesIO(whole))
