"""What a report is of: all that its figures depend on, so that another host's are never taken for ours."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import weight_files
from loaders.kernels.build import compiled
from loaders.quality import Text
from server.host.cpu import cpu_name
from server.host.threads import resolve, run_in_own_thread
from server.version import VERSION

_LIBRARIES = ("torch", "transformers", "bitsandbytes")
_KEY = 16  # hexadecimal digits


@dataclass(frozen=True)
class Subject:
    """A model, loaded in a certain way, on this host, with these versions.

    Args:
        model: its name, revision, architecture, the sizes of its files and a digest of what tells them apart.
        host: device, processor, threads and kernels.
        versions: of bitdial and of what computes.
        settings: how precisions are loaded.
    """

    model: Mapping[str, Any]
    host: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        return digest_of(asdict(self))


@dataclass(frozen=True)
class Reading:
    """A text and how it is read: windows, strides, prompts that are continued.

    Args:
        window, stride: in tokens; None for what the model's context suggests.
    """

    name: str
    size: int
    sha256: str
    window: int | None
    stride: int | None
    prompts: int

    @classmethod
    def of(cls, text: Text, window: int | None, stride: int | None, prompts: int) -> "Reading":
        """Reads the text once."""
        digest = hashlib.sha256()
        with text.open() as stream:
            while data := stream.read(2**20):
                digest.update(data)
        return cls(text.name, text.size, digest.hexdigest(), window, stride, prompts)

    @property
    def key(self) -> str:
        """The same text under another name is the same text."""
        return digest_of({**asdict(self), "name": None})


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_KEY]


def subject_of(spec: ModelSpec) -> Subject:
    """Of a checkpoint as it would be loaded on this host. Tries the kernels out, in a thread of its own."""
    checkpoint = spec.checkpoint
    model = {
        "name": checkpoint.model_id,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "context_length": checkpoint.context_length,
        "vocabulary": checkpoint.vocabulary,
        "file_bytes": checkpoint.file_bytes,
        "files": _files(checkpoint.folder, checkpoint.model_id),
    }
    settings = {
        "max_tokens": spec.max_tokens,
        "quantize_lm_head": spec.quantize_lm_head,
        "int8_threshold": spec.int8_threshold,
        "double_quantization": spec.double_quantization,
        "unquantized_dtype": spec.unquantized_dtype,
    }
    return Subject(model, _host(spec), _versions(), settings)


def _host(spec: ModelSpec) -> dict[str, Any]:
    on_card = spec.device == "cuda"
    return {
        "device": spec.device,
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if on_card else None,
        "threads": resolve(spec.threads),
        "kernels": f"CUDA {torch.version.cuda}" if on_card else _kernels_of_the_host(),
    }


def _kernels_of_the_host() -> str:
    library = run_in_own_thread(kernels.get, 1)
    return compiled(library.name).stem if library is not None else "torch"


def _versions() -> dict[str, str]:
    found = {"bitdial": VERSION, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _files(folder: Path, name: str) -> str:
    """Tells folders of one name apart without reading gigabytes: by the weights' sizes and times, and config.

    A hub model's files have the time of their download, so that another copy of it is measured anew.
    """
    found: list[Any] = []
    try:
        found += [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder, name)
        ]
        found.append((folder / "config.json").read_text(encoding="utf-8"))
    except (
        Exception
    ) as error:  # a checkpoint that can't be looked at can't be loaded either, and that is said
        found.append(type(error).__name__)
    return digest_of(found)


REFERENCE = "fp32"


def slots() -> int:
    """Sequences that a model is loaded for."""
    return max(BATCHES)


BATCHES = (1, 8)
