import errno
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.errors import CheckpointError, ModelNotFound
from tests import checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")


def test_a_folder_is_described(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.model_id, checkpoint.architecture) == ("tiny", "GPT2LMHeadModel")
    assert (checkpoint.context_length, checkpoint.vocabulary) == (256, checkpoints.VOCABULARY)
    assert checkpoint.eos_ids == {0}
    assert checkpoint.file_bytes == (folder / "model.safetensors").stat().st_size
    assert load_tokenizer(checkpoint).decode(load_tokenizer(checkpoint)("the")["input_ids"]) == "the"


def test_the_bundled_model_is_complete_and_small() -> None:
    checkpoint = open_checkpoint("bundled")
    assert checkpoint.architecture == "GPT2LMHeadModel"
    assert sum(file.stat().st_size for file in checkpoint.folder.iterdir() if file.is_file()) <= 12_000_000


@pytest.mark.parametrize("keep", [0, 4, 5000])
def test_a_truncated_file_is_named_without_its_path(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"^model.safetensors is truncated or corrupt") as caught:
        open_checkpoint(str(folder))
    assert str(folder.parent) not in str(caught.value)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(str(folder))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        open_checkpoint(str(folder))


def test_the_files_that_are_loaded_are_the_ones_that_are_checked(folder: Path) -> None:
    """``transformers`` reads the single file, even beside an index."""
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "elsewhere.safetensors"}}')
    assert open_checkpoint(str(folder)).file_bytes == (folder / "model.safetensors").stat().st_size
    loaders.load("fp32", ModelSpec(open_checkpoint(str(folder)))).close()


@pytest.mark.parametrize("precision", ["fp32", "nf4", "dynamic-int8"])
def test_a_missing_tensor_is_refused(folder: Path, precision: str) -> None:
    """``transformers`` fills in random numbers and only warns."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"], tensors["transformer.ln_f.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    named = r"tiny is incomplete: it has no .*mlp\.c_fc\.weight \(2 missing in all"
    with pytest.raises(CheckpointError, match=named):
        loaders.load(precision, ModelSpec(open_checkpoint(str(folder))))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized already \(gptq\)"),
        (
            {"quantization_config": {"quant_method": "bitdial", "precision": "int1"}},
            r"already \(bitdial, int1\)",
        ),
        ({"quantization_config": {"quant_method": "bitdial", "precision": ["fp32"]}}, "no precision serves"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantized already \(bitsandbytes\)"),
        ({"quantization_config": [1]}, r"quantized already \(None\)"),
        ({"transformers_weights": "adapter_model.bin"}, "names weights of its own"),
        ({"n_positions": None}, "not a valid gpt2 configuration"),
    ],
)
def test_an_unsupported_configuration_is_refused(
    folder: Path, extra: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    with pytest.raises(CheckpointError, match="merge it"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("index", "message"),
    [({"weight_map": {"a": 5}}, "not readable"), ({"weight_map": []}, "not readable"), ([], "not readable"),
     ({"weight_map": {"a": "../model.safetensors"}}, "outside"), ({"weight_map": {"a": "/x"}}, "outside")],
)  # fmt: skip
def test_an_invalid_index_is_refused(folder: Path, index: object, message: str) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")  # whole in one file, it needs no index
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "bert-of-mine", "auto_map": {}}', '{"model_type": "t5"}']
)
def test_a_configuration_of_another_kind_of_model_is_refused(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(folder))


def test_code_in_a_checkpoint_is_never_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "modeling.C"}}')
    with pytest.raises(CheckpointError, match="never run"):
        open_checkpoint(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../x", "/nowhere", "https://example.org/m", "owner/name@main", "a\0b", "", "a/b/c", "x" * 300]
)
def test_invalid_model_names_cause_no_network_access(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("loaders.hub.snapshot_download", never)
    with pytest.raises(ModelNotFound):
        open_checkpoint(name)


def hub_answers(status: int) -> OSError:
    error: OSError = LocalEntryNotFoundError("nothing in the cache")
    error.__cause__ = HfHubHTTPError("no", response=Mock(status_code=status, headers={}))
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route"), "can't be reached; name a local folder, or MODEL_ID=bundled"),
        (LocalEntryNotFoundError("nothing"), "not in the local cache and the hub can't be reached"),
        (hub_answers(503), "the hub answers 503"),
        (OSError(errno.ENOSPC, "No space left on device"), "owner/name can't be kept in .*: No space left"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "Permission denied; HF_HOME names another place",
        ),
    ],
)
def test_a_failed_download_names_its_cause(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("loaders.hub.snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=message):
        open_checkpoint("owner/name")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_named(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/data/hub/models--owner--name")

    monkeypatch.setattr("loaders.hub.snapshot_download", full)
    with pytest.raises(ModelNotFound, match=rf"can't be kept in .*: {os.strerror(number)}; HF_HOME names"):
        open_checkpoint("owner/name")
