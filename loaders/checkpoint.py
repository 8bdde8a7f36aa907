"""Finding a model and checking its files before loading. Safetensors only; its own code is never run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loaders import end_tokens
from loaders.base import Checkpoint, Progress, ignore_progress
from loaders.config_check import (
    Held,
    check_files,
    read_config,
    read_json,
    read_raw,
)
from loaders.config_values import context_length
from loaders.errors import CheckpointError
from loaders.hub import locate
from loaders.manifest import MANIFEST
from loaders.saved import has_own_form, held_by, own_files, saved_precision
from loaders.tokenizer_faults import is_tokenizer_fault

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def open_checkpoint(
    model_id: str, revision: str | None = None, progress: Progress = ignore_progress
) -> Checkpoint:
    """Finds ``bundled``, a local folder or a hub id, and checks that its weight files are complete.

    Raises:
        ModelNotFound: there is no such model, or the hub can't be reached.
        CheckpointError: its files are unusable: not safetensors, truncated, not a causal LM.
    """
    folder, name, commit = locate(model_id, revision, progress)
    check_files(folder, name)
    raw = read_raw(folder, name)
    saved = saved_precision(raw, name)
    files = weight_files(folder, name)
    config = read_config(folder, name, raw, held_by(files) if has_own_form(raw) else _held(files))
    if saved is not None:
        del config.quantization_config
    text = config.get_text_config()
    return Checkpoint(
        model_id=name,
        revision=commit,
        folder=folder,
        config=config,
        architecture=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type],
        context_length=context_length(name, text),
        vocabulary=text.vocab_size,
        eos_ids=end_tokens.configured(folder, config),
        file_bytes=sum(file.stat().st_size for file in files),
        saved=saved,
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
            raise ValueError("no words")  # without any files the library makes an empty tokenizer
    except BaseException as error:  # of any class: the library passes on its parsers' errors, and panics
        if not is_tokenizer_fault(error):
            raise
        raise CheckpointError(f"{checkpoint.model_id} has no usable tokenizer") from error
    return tokenizer


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint, or those that the manifest of a saved one names.

    Raises:
        CheckpointError: there are none, or some are missing.
    """
    if (folder / _SINGLE).is_file():  # before the index, as in transformers
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
    if (folder / MANIFEST).is_file():
        return own_files(folder, name)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{name} has its weights in pickle files, which can run code and are never opened; convert them: "
            "model.save_pretrained(folder)"
        )
    raise CheckpointError(f"{name} has no {_SINGLE}; weights in another format are never opened")


def _held(files: Sequence[Path]) -> Held:
    """Tensors and parameters in the files, read from their headers.

    Raises:
        CheckpointError: a file is truncated or corrupt.
    """
    sizes = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                sizes += [math.prod(opened.get_slice(key).get_shape()) for key in opened.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file.name} is truncated or corrupt; fetch it again") from error
    return Held(len(sizes), sum(sizes))
