"""Token ids of the calibration text, for a model's tokenizer."""

from io import BytesIO
from itertools import chain

import torch
from torch import Tensor

from loaders.base import ModelSpec
from loaders.checkpoint import load_tokenizer
from loaders.texts import Text, TextError, TokenStream
from loaders.texts.calibration import CalibrationError, calibration_text

_MOST = 2 << 20  # bytes of a text that are encoded
_LEAST_ENCODED, _PER_TOKEN = 1 << 18, 16  # of a longer text: bytes in all, and for each token of the samples
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
        parts = _spread(text, samples, length)
        streams = (TokenStream(one, tokenizer, vocabulary=checkpoint.vocabulary) for one in parts)
        ids = list(chain.from_iterable(streams))
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


def _spread(text: Text, samples: int, length: int) -> list[Text]:
    """The text; of a long one a stretch for each sample, spread over it."""
    size = min(max(_PER_TOKEN * length, _LEAST_ENCODED // samples), _MOST // samples)
    if text.size <= samples * size:
        return [text]
    return [_stretch(text, at * (text.size - size) // max(1, samples - 1), size) for at in range(samples)]


def _stretch(text: Text, start: int, size: int) -> Text:
    """``size`` bytes from ``start`` on, cut at spaces."""
    with text.open() as stream:
        stream.seek(start)
        data = stream.read(size)
    whole = data.partition(b" ")[2].rpartition(b" ")[0]
    return Text(text.name, len(whole), lambda: BytesIO(whole))
