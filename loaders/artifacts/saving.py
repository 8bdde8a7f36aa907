"""Saving a precision of a checkpoint in a folder that can be served."""

import json
import shutil
import time
from pathlib import Path

from loaders.artifacts.in_use import hold
from loaders.artifacts.prepare import Make, NotKept, is_whole, place_of
from loaders.artifacts.recipe import describe, describe_model
from loaders.base import Checkpoint, ModelSpec, Progress, Recipe
from loaders.manifest import write_manifest
from loaders.saved import OWN

PRODUCTS = (".tflite", ".onnx")
"""Files that are of use by themselves; one can be saved without what serving it needs."""
_READABLE, _READABLE_FOLDER = 0o644, 0o755  # safetensors writes for one user; a container may have another
_TEXTS = (".json", ".txt", ".model", ".jinja")


def save(spec: ModelSpec, recipe: Recipe, make: Make, out: Path, progress: Progress) -> None:
    """Writes a checkpoint in one precision to ``out``: whole, or not at all.

    Args:
        make: writes the precision's files; cached ones are copied instead.
        out: a folder that does not exist or is empty; or a file of one of the ``PRODUCTS``.

    Raises:
        NotKept: it can't be written.
        CheckpointError, CalibrationError
    """
    partial = out.with_name(f"{out.name}.partial")
    cached = place_of(spec, recipe)
    started = time.monotonic()
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if cached.is_dir():
            hold(cached)
        if is_whole(cached):
            shutil.copytree(cached, partial, dirs_exist_ok=True)
        else:
            make(partial, progress)
        if out.suffix in PRODUCTS:
            _only(partial, out).replace(out)
            return
        if not (partial / "config.json").exists():  # else in a form that transformers reads
            described, model = describe(recipe, spec), describe_model(spec.checkpoint)
            write_manifest(partial, recipe.method, described, model, time.monotonic() - started)
            _write_config(spec.checkpoint, recipe.method, partial)
        _copy_texts(spec.checkpoint, partial)
        for path in partial.iterdir():
            path.chmod(_READABLE if path.is_file() else _READABLE_FOLDER)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise NotKept(f"{out.name} can't be written: {error.strerror or type(error).__name__}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _only(folder: Path, out: Path) -> Path:
    found = sorted(folder.glob(f"*{out.suffix}"))
    if len(found) != 1:
        raise NotKept(f"{out.name}: this method writes {len(found)} files of that kind; --out takes a folder")
    return found[0]


def _write_config(checkpoint: Checkpoint, precision: str, folder: Path) -> None:
    """The model's config.json, with the precision as its quantization."""
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": OWN, "precision": precision}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_texts(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer, generation settings and chat template: what a checkpoint has beside its weights."""
    for path in sorted(checkpoint.folder.iterdir()):
        known = path.suffix in _TEXTS and not path.name.endswith(".index.json")
        if known and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    extra = checkpoint.folder / "additional_chat_templates"
    if extra.is_dir():
        shutil.copytree(extra, folder / extra.name)
