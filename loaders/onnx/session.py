"""Sessions of ONNX Runtime: on the CPU, or a card if this build of ONNX Runtime has a provider for it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from loaders.base import Availability

INSTALL = "pip install 'bitdial[onnx]'"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_CARD = "CUDAExecutionProvider"


def availability(device: Literal["cpu", "cuda"]) -> Availability:
    """Whether this host can export models and run them on the device."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        return Availability(f"{missing[0]} is not installed", INSTALL)
    if device == "cuda":
        import onnxruntime  # optional

        if _CARD not in onnxruntime.get_available_providers():
            return Availability(
                "this build of onnxruntime has no CUDA provider", "pip install onnxruntime-gpu"
            )
        if not torch.cuda.is_available():
            return Availability("there is no CUDA device")
    return Availability()


def open_session(path: Path, threads: int, device: Literal["cpu", "cuda"]) -> Any:
    """An ``InferenceSession``. Its threads spin within a run and sleep between runs: other engines compute then."""
    import onnxruntime as ort  # optional

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"] if device == "cpu" else [_CARD, "CPUExecutionProvider"]
    return ort.InferenceSession(str(path), options, providers=providers)
