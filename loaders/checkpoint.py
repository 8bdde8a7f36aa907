"""Finding a model and checking its files before loading. Safetensors only; no code of theirs is run."""

import contextlib
import errno
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from loaders import end_tokens
from loaders.base import (
    Checkpoint,
    CheckpointError,
    ModelNotFound,
    ModelSpec,
    OutOfMemory,
    Progress,
    ignore_progress,
    in_short,
)
from loaders.config_check import (
    Held,
    check_files,
    meta_model_of,
    read_config,
    read_json,
    read_raw,
)
from loaders.cuda.memory import refusals
from loaders.tokenizer_faults import is_tokenizer_fault

BUNDLED = "bundled"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_NOT_OURS = ["consolidated*", "original/*"]  # the same weights once more, in their makers' own layout
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def open_checkpoint(
    model_id: str, revision: str | None = None, progress: Progress = ignore_progress
) -> Checkpoint:
    """Finds ``bundled``, a local folder or a hub id, and checks that its weights are whole.

    Raises:
        ModelNotFound: no such model, or the hub can't be reached.
        CheckpointError: its files are unusable: not safetensors, truncated, not a causal LM.
    """
    folder, name, commit = _locate(model_id, revision, progress)
    check_files(folder, name)
    raw = read_raw(folder, name)
    files = weight_files(folder, name)
    config = read_config(folder, name, raw, _held(files))
    text = config.get_text_config()
    return Checkpoint(
        model_id=name,
        revision=commit,
        folder=folder,
        config=config,
        architecture=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type],
        context_length=text.max_position_embeddings,
        vocabulary=text.vocab_size,
        eos_ids=end_tokens.configured(folder, config),
        file_bytes=sum(file.stat().st_size for file in files),
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("no words")  # without any files the library makes such a one
    except BaseException as error:  # the library raises whatever its parsers do, and panics
        if not is_tokenizer_fault(error):
            raise
        raise CheckpointError(f"{checkpoint.model_id} has no usable tokenizer") from error
    return tokenizer


def load_pretrained(spec: ModelSpec, progress: Progress, **options: Any) -> PreTrainedModel:
    """The model in evaluation mode; ``options`` (``dtype`` …) go to ``from_pretrained``.

    Raises:
        CheckpointError: unreadable, or without some of the model's tensors: those would be random numbers.
        OutOfMemory
    """
    name, refused = spec.checkpoint.model_id, refusals()
    try:
        with _bars_to(progress):
            model, report = AutoModelForCausalLM.from_pretrained(
                spec.checkpoint.folder,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # told in the report, where they are refused
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"no room on the device for {name}") from error
    except MemoryError as error:
        raise OutOfMemory(f"no room for {name}") from error
    except Exception as error:  # whatever a model class, or quantizing, makes of what is in the files
        if refusals() > refused:  # what quantizing raises, the library tells as a fault of the checkpoint
            raise OutOfMemory(f"no room on the device for {name}") from error
        raise CheckpointError(f"{name} could not be loaded ({in_short(error)})") from error
    _check_complete(name, report)
    model.eval()
    return model


def _check_complete(name: str, report: Mapping[str, Any]) -> None:
    """What a checkpoint lacks, the library would fill with random numbers."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{name} is incomplete: it has no {missing[0]} ({len(missing)} missing in all)")
    if misfits := sorted(key for key, *_ in report["mismatched_keys"]):
        raise misfit(name, misfits)


def misfit(name: str, tensors: Sequence[str]) -> CheckpointError:
    """The error that tells of tensors whose shapes are not those of the configuration."""
    return CheckpointError(
        f"{name} does not fit its config.json: {tensors[0]} has another shape ({len(tensors)} in all)"
    )


def meta_model(spec: ModelSpec) -> PreTrainedModel:
    """The model's shapes without its weights."""
    return meta_model_of(spec.checkpoint.config)


def _locate(model_id: str, revision: str | None, progress: Progress) -> tuple[Path, str, str | None]:
    """Its folder, the name to show and the hub commit."""
    if model_id == BUNDLED:
        return Path(__file__).parent / "bundled", BUNDLED, None
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no path: too long, NUL, no such home
        if model_id and (folder := Path(model_id).expanduser().resolve()).is_dir():
            return folder, folder.name, None
    if not _HUB_ID.fullmatch(model_id) or ".." in model_id:
        shown = ascii(model_id if len(model_id) <= 200 else f"{model_id[:200]}…")
        raise ModelNotFound(
            f"the model {shown} is neither 'bundled', nor an existing folder, nor a hub id (owner/name)"
        )
    progress("downloading", 0, 0)
    folder = _download(model_id, revision)
    return folder, model_id, folder.name


def _download(model_id: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT_OURS
            )
        )
    except GatedRepoError as error:
        raise ModelNotFound(f"{model_id} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{model_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"the hub has no model {model_id}; a private one needs HF_TOKEN") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if error.errno in _NO_PLACE:
            place = f"{constants.HF_HUB_CACHE}: {error.strerror}; HF_HOME names another place"
            raise ModelNotFound(f"{model_id} can't be kept in {place}") from error
        raise ModelNotFound(
            f"{model_id} is not in the local cache and the hub {_what_is_wrong(error)}; "
            "name a local folder, or MODEL_ID=bundled"
        ) from error


def _what_is_wrong(error: OSError) -> str:
    cause = error if isinstance(error, HfHubHTTPError | OfflineModeIsEnabled) else error.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return "is not asked, since HF_HUB_OFFLINE is set"
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        return f"answers {cause.response.status_code}"
    return "can't be reached"


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: there are none, or some are missing.
    """
    if (folder / _SINGLE).is_file():  # first, as transformers has it
        return [folder / _SINGLE]
    if (folder / _INDEX).exists():
        try:
            names = sorted(set(read_json(folder / _INDEX, name)["weight_map"].values()))
            plain = all(Path(file).name == file for file in names)
        except (OSError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{_INDEX} of {name} is not readable") from error
        if not plain:
            raise CheckpointError(f"{_INDEX} of {name} names files outside of its folder")
        if missing := [file for file in names if not (folder / file).is_file()]:
            raise CheckpointError(f"{name} is incomplete: {missing[0]} is missing ({len(missing)} in all)")
        return [folder / file for file in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{name} has its weights in pickle files, which can run code and are never opened; convert them: "
            "model.save_pretrained(folder)"
        )
    raise CheckpointError(f"{name} has no {_SINGLE}; weights in another format are never opened")


def _held(files: Sequence[Path]) -> Held:
    """What whole files hold, by their headers.

    Raises:
        CheckpointError: one is not whole.
    """
    sizes = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                sizes += [math.prod(opened.get_slice(key).get_shape()) for key in opened.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file.name} is truncated or corrupt; fetch it again") from error
    return Held(len(sizes), sum(sizes))


@contextlib.contextmanager
def _bars_to(progress: Progress) -> Iterator[None]:
    """While in it, transformers' loading bar is told to ``progress`` instead of being drawn."""

    class Bar:
        def __init__(self, iterable: Any = None, total: int | None = None, **_: Any) -> None:
            self.iterable, self.total, self.n = iterable, total or 0, 0
            if iterable is not None and not self.total:
                self.total = len(iterable) if hasattr(iterable, "__len__") else 0

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable or ():
                yield item
                self.update()

        def update(self, count: int = 1) -> None:
            self.n += count
            progress("loading", self.n, self.total)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: None

    before = transformers_logging.get_verbosity()
    previous = transformers_logging.set_tqdm_hook(lambda _, args, kwargs: Bar(*args, **kwargs))
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
        transformers_logging.set_verbosity(before)
