"""What ``bitdial quality`` measures: the precisions of a model, or models against another one's fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

import loaders
from loaders.base import Checkpoint, ModelSpec
from loaders.errors import CheckpointError, ModelNotFound, PrecisionUnavailable
from loaders.model_id import split_revision
from server.commands.command_line import UsageError, for_saved
from server.commands.progress import ProgressBars
from server.settings.model import ModelSettings
from server.settings.models import ModelSource, named_sources, several_models
from server.settings.output import precisions_option
from server.settings.suited import for_suited
from server.settings.types import ALL, Precisions, listed, option

if TYPE_CHECKING:
    from loaders.texts import Text

REFERENCE = "fp32"
_WHAT = "what is measured"
_SLOTS = 8  # prompts continued together
_COMPARED = 2**14  # bytes of the text that both tokenizers encode


def _named(text: str | None) -> str | None:
    if text is not None and split_revision(text)[1] == "":
        raise ValueError("after @ it has no revision")
    return text


class MeasuredSettings(ModelSettings):
    """The models and precisions to measure, and the model whose fp32 they are measured against."""

    precisions: Precisions | None = precisions_option(_WHAT)
    reference: Annotated[str | None, AfterValidator(_named)] = option(
        None,
        _WHAT,
        "NAME",
        "the original of a model that is saved quantized: a folder, or a hub id, owner/name@revision; its "
        "fp32 comes first, and all else is measured against it",
        unset="the model itself",
    )
    models: Annotated[str | None, AfterValidator(several_models)] = option(
        None,
        _WHAT,
        "LIST",
        "several models to measure against the reference in place of --model, by comma; name=folder gives "
        "one a name",
        unset="--model alone",
    )

    def names(self) -> tuple[str, ...]:
        """The given precisions, or those this host can run; fp32 first if included."""
        names = listed(self.precisions, self.resolved_device())
        return tuple(dict.fromkeys(sorted(names, key=lambda name: name != REFERENCE)))


@dataclass(frozen=True)
class Measured:
    """One precision of one model."""

    model: str
    """Its name: as given in ``--models``, else the checkpoint's."""
    precision: str
    spec: ModelSpec

    @property
    def label(self) -> str:
        """``model:precision``, as requests to a server of several models name it."""
        return f"{self.model}:{self.precision}"


@dataclass(frozen=True)
class Measurement:
    """What is measured, in the order of the rows.

    Args:
        reference: its fp32 is what all are measured against; first of the rows, or in none of them.
        has_other_models: whether the rows are of other models than the reference's.
    """

    reference: Measured
    rows: Sequence[Measured]
    has_other_models: bool = False

    @property
    def models(self) -> list[str]:
        """The names of the measured models, without that of a reference of their own."""
        rows = self.rows[self.has_other_models :] or self.rows
        return list(dict.fromkeys(row.model for row in rows))


def require_consistent(options: MeasuredSettings, arguments: Sequence[str]) -> None:
    """Checks the options among each other, before any model is opened.

    Args:
        arguments: the command line.

    Raises:
        UsageError
    """
    given = {argument.partition("=")[0] for argument in arguments}
    if options.models is None:
        return
    if {"--model", "--model-id"} & given:  # MODEL_ID of the environment gives way
        raise UsageError("--model is of one model: not with --models")
    if options.revision is not None:
        raise UsageError("--revision (or REVISION) is of one model: in --models write owner/name@revision")
    if options.reference is None:
        raise UsageError("--models needs --reference: the model whose fp32 they are measured against")
    _sources(options)


def find_measured(options: MeasuredSettings, text: Text, window: int | None) -> Measurement:
    """Opens the checkpoints and checks that they can be measured; loads no weights.

    Args:
        text: that they are measured on.
        window: tokens computed in one pass; None: the models' context.

    Raises:
        UsageError: a model is saved quantized and has no reference, or the reference is saved quantized.
        LoaderError: a model can't be had, a precision can't be made of it, or it isn't comparable with the
            reference.
        TextError: the text can't be read.
    """
    if options.reference is not None:
        return _against(options, options.reference, text, window)
    checkpoint = _opened(options.model_id, options.revision)
    if checkpoint.saved is not None:
        raise UsageError(
            f"{checkpoint.model_id} is saved in {checkpoint.saved} and has no {REFERENCE} to be measured "
            "against: name the model it was made from with --reference"
        )
    rows = _rows(options, checkpoint, checkpoint.model_id)
    return Measurement(Measured(checkpoint.model_id, REFERENCE, options.spec(checkpoint, _SLOTS)), rows)


def _against(options: MeasuredSettings, name: str, text: Text, window: int | None) -> Measurement:
    try:
        original = _opened(*split_revision(name))
    except ModelNotFound as error:
        raise ModelNotFound(f"--reference: {error}") from error
    if original.saved is not None:
        raise UsageError(
            f"--reference: {original.model_id} is itself saved in {original.saved}; name the model it was "
            f"made from, whose {REFERENCE} is the reference"
        )
    reference = Measured(original.model_id, REFERENCE, options.spec(original, _SLOTS))
    rows, sources = [reference], _sources(options)
    checkpoints = [_opened(source.source, source.revision) for source in sources]
    _require_known(options, checkpoints)
    for source, checkpoint in zip(sources, checkpoints, strict=True):
        measured = Measured(source.name or checkpoint.model_id, REFERENCE, options.spec(checkpoint, _SLOTS))
        _require_comparable(measured, reference, text, window)
        found = _rows(for_saved(options, checkpoint, beside_others=True), checkpoint, measured.model)
        same = checkpoint.folder == original.folder  # the reference once more
        rows += [row for row in found if not (same and row.precision == REFERENCE)]
    return Measurement(reference, rows, has_other_models=True)


def _sources(options: MeasuredSettings) -> list[ModelSource]:
    """Raises: UsageError, if two models have one name."""
    if options.models is None:
        return [ModelSource(options.model_id, None, options.revision)]
    try:
        return named_sources(options.models)
    except ValueError as error:
        raise UsageError(f"--models: {error}") from None


def _opened(model_id: str, revision: str | None) -> Checkpoint:
    from loaders.checkpoint import open_checkpoint  # late: help and usage must not wait for transformers

    return open_checkpoint(model_id, revision, ProgressBars(model_id))


def _rows(options: MeasuredSettings, checkpoint: Checkpoint, name: str) -> list[Measured]:
    """Raises: PrecisionUnavailable, for a named precision that can't be loaded from the checkpoint."""
    spec = options.spec(checkpoint, _SLOTS)
    names = for_suited(options, spec).names()
    for precision in names:
        if not (able := loaders.offered(precision, spec)).ok:
            raise PrecisionUnavailable(precision, able)
    return [Measured(name, precision, spec) for precision in names]


def _require_known(options: MeasuredSettings, checkpoints: Sequence[Checkpoint]) -> None:
    """Raises: UsageError, for a named precision that none of the models can have: all are saved quantized."""
    saved = [one.saved for one in checkpoints]
    named = () if options.precisions in (ALL, None) else options.precisions or ()
    if None in saved:
        return
    for name in named:
        if name not in (REFERENCE, *saved):
            raise UsageError(
                f"--precisions: {checkpoints[0].model_id} is saved in {saved[0]}; for {name} name the model "
                "it was made from"
            )


def _require_comparable(one: Measured, reference: Measured, text: Text, window: int | None) -> None:
    """Raises: CheckpointError, if the models can't be compared token by token, or not in such windows."""
    checkpoint, original = one.spec.checkpoint, reference.spec.checkpoint
    why = _different_tokens(checkpoint, original, text)
    if checkpoint.vocabulary != original.vocabulary:
        why = f"their vocabularies have {checkpoint.vocabulary:,} and {original.vocabulary:,} tokens"
    if why is not None:
        raise CheckpointError(f"{one.model} can't be measured against {reference.model}: {why}")
    lengths = (one.spec.max_tokens, reference.spec.max_tokens)
    if min(lengths) < (window or max(lengths)):
        raise CheckpointError(
            f"{one.model} has a context of {lengths[0]:,} tokens, {reference.model} of {lengths[1]:,}: give "
            f"--window, of at most {min(lengths)}"
        )


def _different_tokens(checkpoint: Checkpoint, original: Checkpoint, text: Text) -> str | None:
    """How the tokenizers differ; None if they have the same tokens and encode the text's beginning alike."""
    from loaders.checkpoint import load_tokenizer
    from loaders.texts import TokenStream

    one, other = load_tokenizer(checkpoint), load_tokenizer(original)
    if one.get_vocab() != other.get_vocab():
        return "their tokenizers have different tokens"

    def beginning(tokenizer: Any) -> list[int]:
        return list(islice(TokenStream(text, tokenizer, _COMPARED), _COMPARED // 4))

    if beginning(one) != beginning(other):
        return f"their tokenizers encode {text.name} differently"
    return None
