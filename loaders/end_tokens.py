"""The tokens that end a text, from a checkpoint's configuration files and its tokenizer."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loaders.base import Checkpoint
from loaders.config_check import read_json
from loaders.errors import CheckpointError

_FILE = "generation_config.json"


def configured(folder: Path, config: Any) -> frozenset[int]:
    """The end tokens of ``generation_config.json`` or, if it has none, of ``config.json``.

    There, a nested text model's take precedence. Ids beyond the vocabulary are dropped.
    """
    nested = config.get_text_config()
    for value in (_of_generation(folder), *(getattr(one, "eos_token_id", None) for one in (nested, config))):
        if ids := frozenset(id_ for id_ in _ids(value) if id_ < nested.vocab_size):
            return ids
    return frozenset()


def with_end_token(checkpoint: Checkpoint, tokenizer: Any) -> Checkpoint:
    """The checkpoint with the tokenizer's end token among its own.

    Models tuned for conversations often end turns with a token that only their tokenizer names.
    """
    ids = _ids(getattr(tokenizer, "eos_token_id", None))
    # a tokenizer may have more ids than its model
    own = frozenset(id_ for id_ in ids if id_ < checkpoint.vocabulary)
    return replace(checkpoint, eos_ids=checkpoint.eos_ids | own)


def _of_generation(folder: Path) -> Any:
    try:
        found = read_json(folder / _FILE, folder.name)
    except (FileNotFoundError, CheckpointError):  # an unreadable file counts as absent
        return None
    return found.get("eos_token_id") if isinstance(found, dict) else None


def _ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return (id_ for id_ in values if type(id_) is int and id_ >= 0)
