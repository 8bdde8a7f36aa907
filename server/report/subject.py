"""The key of a report: everything its figures depend on, so that another host's are never reused."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loaders import kernels
from loaders.base import ModelSpec
from loaders.checkpoint import weight_files
from loaders.kernels.build import compiled
from loaders.texts import Text
from loaders.texts.calibration import calibration_text
from server.host.cpu import cpu_name
from server.host.threads import resolve, run_in_own_thread
from server.version import VERSION

_LIBRARIES = ("torch", "transformers", "bitsandbytes")
_KEY = 16  # hexadecimal digits


@dataclass(frozen=True)
class Subject:
    """A model, its load settings, the host and the versions of the software.

    Args:
        model: name, revision, architecture, file sizes and a digest that identifies the files.
        host: device, processor, threads and kernels.
        versions: of bitdial and of the libraries that compute.
        settings: the load settings of precisions.
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
    """A text and how it is evaluated: windows, strides, number of prompts.

    Args:
        window, stride: in tokens; None: derived from the model's context.
    """

    name: str
    size: int
    sha256: str
    window: int | None
    stride: int | None
    prompts: int

    @classmethod
    def of(cls, text: Text, window: int | None, stride: int | None, prompts: int) -> "Reading":
        """Reads the whole text for its digest."""
        digest = hashlib.sha256()
        with text.open() as stream:
            while data := stream.read(2**20):
                digest.update(data)
        return cls(text.name, text.size, digest.hexdigest(), window, stride, prompts)

    @property
    def key(self) -> str:
        """The same text under another name has the same key."""
        return digest_of({**asdict(self), "name": None})


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_KEY]


def subject_of(spec: ModelSpec) -> Subject:
    """The subject of a checkpoint loaded on this host. Compiles the kernels if they aren't yet."""
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
        "lm_head_dtype": spec.lm_head_dtype,
        "calibration": None if spec.calibration is None else calibration_text(spec.calibration).sha256(),
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
    libraries = {name: _version(name) for name in _LIBRARIES}
    return {"bitdial": VERSION, "python": platform.python_version(), **libraries}


@cache
def _version(library: str) -> str:
    """Kept: each model of a server has a subject, and a library's metadata takes milliseconds to parse."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _files(folder: Path, name: str) -> str:
    """A digest of the weight files' sizes and mtimes and of the config, without reading gigabytes.

    A hub model's files have the time of their download, so another download of it is measured again.
    """
    found: list[Any] = []
    try:
        found += [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder, name)
        ]
        found.append((folder / "config.json").read_text(encoding="utf-8"))
    except Exception as error:  # loading fails too then, and reports the error
        found.append(type(error).__name__)
    return digest_of(found)


REFERENCE = "fp32"


def slots() -> int:
    """KV slots of a measured model."""
    return max(BATCHES)


BATCHES = (1, 8)
