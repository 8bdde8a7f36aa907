import json
from pathlib import Path

import pytest
import torch

from loaders.base import CheckpointError, ModelNotFound
from loaders.checkpoint import load_tokenizer, open_checkpoint
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


def test_the_bundled_model_is_whole_and_small() -> None:
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
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("index", "told"),
    [({"weight_map": {"a": 5}}, "not readable"), ({"weight_map": []}, "not readable"), ([], "not readable"),
     ({"weight_map": {"a": "../model.safetensors"}}, "outside"), ({"weight_map": {"a": "/x"}}, "outside")],
)  # fmt: skip
def test_an_index_that_is_no_list_of_its_files(folder: Path, index: object, told: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "bert-of-mine", "auto_map": {}}', '{"model_type": "t5"}']
)
def test_a_configuration_that_is_no_causal_lm(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(folder))


def test_code_of_the_checkpoints_own_is_never_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "modeling.C"}}')
    with pytest.raises(CheckpointError, match="never run"):
        open_checkpoint(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../x", "/nowhere", "https://example.org/m", "owner/name@main", "a\0b", "", "a/b/c", "x" * 300]
)
def test_names_that_are_no_models_touch_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("loaders.checkpoint.snapshot_download", never)
    with pytest.raises(ModelNotFound):
        open_checkpoint(name)


def test_without_a_hub_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("loaders.checkpoint.snapshot_download", offline)
    with pytest.raises(ModelNotFound, match="MODEL_ID=bundled"):
        open_checkpoint("owner/name")
