"""The peers' worker process. Runs in their environment, without torch."""

from importlib.metadata import version
from pathlib import Path

from server.bench.peers.exported import Exported
from server.bench.worker import BatchEngine, Worker

PAIRS: dict[str, list[tuple[str, str]]] = {
    "fp32": [("llama.cpp", "f32"), ("CTranslate2", "float32")],
    "dynamic-int8": [("llama.cpp", "Q8_0"), ("CTranslate2", "int8")],
    "int8": [("llama.cpp", "Q8_0"), ("CTranslate2", "int8")],
    "nf4": [("llama.cpp", "Q4_0"), ("llama.cpp", "Q4_K_M")],
}
"""Peers by precision: (engine, its closest formats)."""


def main() -> None:
    versions = {name: version(name) for name in ("llama-cpp-python", "ctranslate2")}
    Worker({"llama.cpp": _llama_cpp, "CTranslate2": _ctranslate2}, versions).serve()


def _llama_cpp(kind: str, export: str, threads: int) -> BatchEngine:
    from server.bench.peers.gguf_file import write_gguf
    from server.bench.peers.llama import LlamaCpp, quantize

    plain, wanted = Path(export) / "f32.gguf", Path(export) / f"{kind}.gguf"
    if not plain.exists():
        write_gguf(Exported(Path(export)), plain)
    if not wanted.exists():
        quantize(plain, kind, wanted, threads)
    return LlamaCpp(wanted, threads)


def _ctranslate2(kind: str, export: str, threads: int) -> BatchEngine:
    from server.bench.peers.ct2 import CTranslate2
    from server.bench.peers.ct2_folder import write_ctranslate2

    folder = Path(export) / "ctranslate2"
    if not folder.exists():
        write_ctranslate2(Exported(Path(export)), folder)
    return CTranslate2(folder, kind, threads)
