"""The tokens that end a text: what a checkpoint's configurations and its tokenizer say of them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loaders.base import Checkpoint
from loaders.config_check import read_json
from loaders.errors import CheckpointError

_FILE = "generation_config.json"


def configured(folder: Path, config: Any) -> frozenset[int]:
    """``generation_config.json``'s if it names any, else ``config.json``'s, the nested text model's first.

    Ids beyond the vocabulary don't count.
    """
    nested = config.get_text_config()
    for value in (_of_generation(folder), *(getattr(one, "eos_token_id", None) for one in (nested, config))):
        if ids := frozenset(id_ for id_ in _ids(value) if id_ < nested.vocab_size):
            return ids
    return frozenset()


def with_end_token(checkpoint: Checkpoint, tokenizer: Any) -> Checkpoint:
    """The checkpoint whose texts end with the tokenizer's own end token, too.

    Models tuned for conversations often end turns by a token that only their tokenizer names.
    """
    ids = _ids(getattr(tokenizer, "eos_token_id", None))
    own = frozenset(
        id_ for id_ in ids if id_ < checkpoint.vocabulary
    )  # a tokenizer may know more than its model
    return replace(checkpoint, eos_ids=checkpoint.eos_ids | own)


def _of_generation(folder: Path) -> Any:
    try:
        found = read_json(folder / _FILE, folder.name)
    except (FileNotFoundError, CheckpointError):  # unreadable: as if there were none
        return None
    return found.get("eos_token_id") if isinstance(found, dict) else None


def _ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return (id_ for id_ in values if type(id_) is int and id_ >= 0)
