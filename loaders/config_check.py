"""Reading a checkpoint's config.json without trusting it: its values must be possible and fit the weights.

``transformers`` checks few of them: it builds layers until memory is exhausted, and sizes below 1 or beyond
the tensors fail later, in the code that first computes with them.
"""

import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loaders.config_values import check_values
from loaders.errors import CheckpointError, in_short

_MOST_CONFIG, _MOST_JSON = 16 << 20, 512 << 20  # bytes; the largest tokenizers there are have 40 MB
_READ = {".json", ".txt", ".model", ".jinja"}  # files that transformers may read, beside the weights
_MOST, _MOST_IN_LIST, _MOST_LABELS, _MOST_EXPERTS = 2**31, 2**24, 10**5, 2**10
_LAYERS = re.compile(r"(n|num|num_hidden|encoder|decoder)_layers?$")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True)
class Held:
    """The contents of the weight files."""

    tensors: int
    parameters: int
    """Elements of all tensors together."""


def check_files(folder: Path, name: str) -> None:
    """Checks the type and size of every file that will be read from the folder, without opening any.

    Raises:
        CheckpointError: a file is a device or a pipe, which may never end, or is larger than any real one.
    """
    places = (folder, folder / "additional_chat_templates")
    try:
        paths = sorted(path for place in places if place.is_dir() for path in place.iterdir())
    except OSError as error:
        raise CheckpointError(f"the folder of {name} can't be read ({type(error).__name__})") from error
    for path in paths:
        if path.suffix in _READ:
            _check_file(path, name, _MOST_CONFIG if path.name == "config.json" else _MOST_JSON)


def _check_file(path: Path, name: str, most: int) -> None:
    try:
        found = path.stat()
    except OSError:
        return  # a dangling link: reported as missing by the code that reads it
    if stat.S_ISDIR(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path.name} of {name} is not a regular file")
    if found.st_size > most:
        raise CheckpointError(f"{path.name} of {name} has {found.st_size} bytes; {most} are the most")


def read_json(path: Path, name: str) -> Any:
    """The contents of a JSON file that ``check_files`` has accepted.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it can't be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path.name} of {name} is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} of {name} is not readable JSON") from error


def read_raw(folder: Path, name: str) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        CheckpointError: there is none, or it belongs to a model that can't be served here.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{name} is an adapter; merge it into its model first: merge_and_unload()")
    try:
        raw = read_json(folder / "config.json", name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} has no config.json: it is not a transformers checkpoint") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"config.json of {name} is not an object")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = "it needs code of its own, which is never run" if "auto_map" in raw else "no known causal LM"
        raise CheckpointError(f"{name} can't be served: {own} (model_type {str(kind)[:40]!r})")
    if "transformers_weights" in raw:  # it may name a pickle
        raise CheckpointError(f"config.json of {name} names weights of its own; only safetensors are opened")
    return raw


def read_config(folder: Path, name: str, raw: Mapping[str, Any], held: Held) -> Any:
    """The ``transformers`` configuration, checked by building its model on the meta device.

    Args:
        raw: the result of ``read_raw``.
        held: the contents of the weight files.

    Raises:
        CheckpointError: it describes no model, or one that doesn't fit the weights.
    """
    _check_counts(name, raw, held)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
    except Exception as error:  # of any class: configuration classes check values in their own ways
        kind = raw["model_type"]
        raise CheckpointError(
            f"config.json of {name} is not a valid {kind} configuration ({in_short(error)})"
        ) from error
    _check_sizes(name, text)
    _check_activations(name, text)
    check_values(name, text)
    try:
        parameters = sum(parameter.numel() for parameter in meta_model_of(config).parameters())
    except Exception as error:  # model classes as well
        raise CheckpointError(f"config.json of {name} describes no model ({in_short(error)})") from error
    if parameters > 2 * held.parameters:  # single missing or misshapen tensors are found by loading
        raise CheckpointError(
            f"{name} does not fit its config.json: that describes {parameters} parameters, "
            f"the files hold {held.parameters}"
        )
    return config


class _WithoutInit(TorchFunctionMode):
    """Skips ``torch.nn.init``: nothing is to be filled, and on the meta device ``normal_`` is Python code."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model_of(config: Any) -> PreTrainedModel:
    """The model on the meta device: shapes without weights."""
    with torch.device("meta"), _WithoutInit():
        return AutoModelForCausalLM.from_config(config)


def _check_counts(name: str, raw: Mapping[str, Any], held: Held) -> None:
    """Checks sizes, lengths of lists and numbers of layers before a model is built."""
    family = CONFIG_MAPPING[raw["model_type"]]
    for size in _SIZES:
        shown = _own_name(family, size)
        _check_size(name, shown, raw.get(shown))
    for key, value, in_list in _numbers(raw):
        if in_list:
            most = _MOST_IN_LIST
        elif _LAYERS.search(key):
            most = held.tensors  # a layer has at least one tensor
        elif key == "num_labels":
            most = _MOST_LABELS
        elif key.endswith("experts"):
            most = _MOST_EXPERTS
        else:
            continue
        if value > most:
            raise CheckpointError(
                f"config.json of {name} has {key} {value}, beyond what is possible ({most})"
            )


def _numbers(value: Any) -> Iterator[tuple[str, int | float, bool]]:
    """(key, number, whether in a list) of every number in a JSON value. Iterative: nesting may be deep."""
    left: list[tuple[str, Any, bool]] = [("", value, False)]
    while left:
        key, value, in_list = left.pop()
        if isinstance(value, dict):
            left += ((str(inner), item, in_list) for inner, item in value.items())
        elif isinstance(value, list):
            left += ((key, item, True) for item in value)
        elif isinstance(value, int if in_list else int | float) and not isinstance(value, bool):
            yield key, value, in_list


def _check_sizes(name: str, text: Any) -> None:
    for size in _SIZES:
        value, shown = getattr(text, size, None), _own_name(text, size)
        if value is None and size in _NEEDED:
            raise CheckpointError(f"config.json of {name} tells no {shown}")
        _check_size(name, shown, value)


def _check_size(name: str, shown: str, value: Any) -> None:
    for one in value if isinstance(value, list) else [value]:  # in some models a list with one value a layer
        if one is not None and (type(one) is not int or not 1 <= one <= _MOST):
            raise CheckpointError(f"config.json of {name} has {shown} {str(one)[:40]}")


def _own_name(text: Any, size: str) -> str:
    """The name of a size in the model's family, such as GPT-2's ``n_head``."""
    names: Mapping[str, str] = getattr(text, "attribute_map", {})
    return names.get(size, size)


def _check_activations(name: str, text: Any) -> None:
    for key in _ACTIVATIONS:
        value = getattr(text, key, None)
        if isinstance(value, str) and value not in ACT2FN:
            raise CheckpointError(f"config.json of {name} names an unknown {key} {value[:40]!r}")
