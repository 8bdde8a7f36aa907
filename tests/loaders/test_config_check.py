"""A model folder is served, or refused with a reason in one line before a model is built from it."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import loaders
from loaders.base import ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.errors import CheckpointError, LoaderError, OutOfMemory, PrecisionUnavailable
from server.__main__ import main
from server.commands import generate, serve
from tests import checkpoints

MAKERS = {"gpt2": checkpoints.gpt2, "llama": checkpoints.llama}
WRONG = [0, -1, 7, 10**9, 10**18, 1.5, "5", None, [], {}, True, float("nan"), float("inf"), "nope", -(10**30)]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("originals")
    for family, make in MAKERS.items():
        checkpoints.save(make(), place / family)
    return place


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: shutil.copytree(originals / family, tmp_path / "tiny")


def change(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {"n_layer": 0}, "has n_layer 0"),
        ("gpt2", {"n_layer": -1}, "has n_layer -1"),
        ("gpt2", {"n_layer": 10**9}, "has n_layer 1000000000, beyond"),
        ("gpt2", {"n_layer": None}, "n_layer"),
        ("gpt2", {"n_head": 7}, "divisible"),
        ("gpt2", {"n_head": 0}, "has n_head 0"),
        ("gpt2", {"n_head": "5"}, "n_head"),
        ("gpt2", {"n_positions": -5}, "has n_positions -5"),
        ("gpt2", {"n_positions": 10**18}, "has n_positions 1000000000000000000"),
        ("gpt2", {"n_positions": 10**8}, r"describes \d+ parameters, the files hold"),
        ("gpt2", {"n_embd": 2**20}, r"describes \d+ parameters, the files hold"),
        ("gpt2", {"activation_function": "nope"}, "unknown activation_function 'nope'"),
        ("gpt2", {"model_type": ["gpt2"]}, "no known causal LM"),
        ("gpt2", {"num_labels": 10**9}, "num_labels"),
        ("llama", {"num_hidden_layers": 0}, "has num_hidden_layers 0"),
        ("llama", {"num_attention_heads": 0}, "has num_attention_heads 0"),
        ("llama", {"num_key_value_heads": -2}, "has num_key_value_heads -2"),
        ("llama", {"head_dim": 0}, "has head_dim 0"),
        ("llama", {"max_position_embeddings": 10**18}, "has max_position_embeddings"),
        ("llama", {"vocab_size": 2**30}, r"describes \d+ parameters, the files hold"),
        ("llama", {"hidden_act": "nope"}, "unknown hidden_act 'nope'"),
        ("llama", {"rope_parameters": {"rope_type": "nope"}}, "names an unknown rope_type 'nope'"),
    ],
)
def test_impossible_configurations_are_refused(
    family: str, fields: dict[str, Any], message: str, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(change(folder(family), **fields)))
    assert "\n" not in str(caught.value)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def deep(path: Path) -> None:
    path.write_text('{"model_type": "gpt2", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is not a regular file"),
        (endless, "is not a regular file"),
        (sparse, "bytes; .* are the most"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "vocab.json"])
def test_a_file_without_an_end_is_never_opened(
    make: Callable[[Path], None], message: str, file: str, folder: Callable[[str], Path]
) -> None:
    place = folder("gpt2")
    (place / file).unlink(missing_ok=True)
    make(place / file)
    with pytest.raises(CheckpointError, match=f"^{file} of tiny .*{message}"):
        open_checkpoint(str(place))


def test_a_context_beyond_memory_is_refused(folder: Callable[[str], Path]) -> None:
    place = change(folder("llama"), max_position_embeddings=2**31)
    with pytest.raises(OutOfMemory, match="MAX_TOTAL_TOKENS"):
        loaders.load("fp32", ModelSpec(open_checkpoint(str(place)), slots=2**14))


def test_deep_nesting_and_a_config_that_is_not_an_object_are_refused(folder: Callable[[str], Path]) -> None:
    place = folder("gpt2")
    deep(place / "config.json")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        open_checkpoint(str(place))
    (place / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an object"):
        open_checkpoint(str(place))


def test_invalid_end_tokens_are_dropped(folder: Callable[[str], Path]) -> None:
    place = change(folder("gpt2"), eos_token_id=0)
    change(place, "generation_config.json", eos_token_id=[5, -1, 10**9, True, "7"])
    assert open_checkpoint(str(place)).eos_ids <= {0, 5}
    change(place, "generation_config.json", eos_token_id=[[5]])
    assert open_checkpoint(str(place)).eos_ids == {0}


@pytest.mark.parametrize("command", [serve.main, generate.main], ids=["serve", "generate"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [({"n_layer": 0}, "n_layer 0"), ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon|can't be served")],
)
def test_a_command_fails_with_one_line(
    command: Callable[[list[str]], int],
    fields: dict[str, Any],
    message: str,
    folder: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", str(change(folder("gpt2"), **fields))]
    code = command([*arguments, "the"] if command is generate.main else [*arguments, "--port", "0"])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bitdial")]
    assert code == 1
    assert len(lines) == 1
    assert any(part in lines[0] for part in message.split("|"))


def test_a_width_unsupported_by_four_bits_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = checkpoints.llama().config
    config.intermediate_size = 100
    model = type(checkpoints.llama())(config)
    spec = ModelSpec(open_checkpoint(str(checkpoints.save(model, tmp_path / "narrow"))), slots=1)
    with pytest.raises(
        PrecisionUnavailable, match=r"layers\.0\.mlp\.down_proj has 100 inputs, no multiple of 64"
    ):
        loaders.load("nf4", spec)
    assert loaders.load("dynamic-int8", spec).runner.score([5, 6]).isfinite().all()


def test_a_tokenizer_with_more_tokens_than_the_model_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = checkpoints.gpt2().config
    config.vocab_size = 100
    place = checkpoints.save(GPT2LMHeadModel(config), tmp_path / "few")
    (tmp_path / "words.txt").write_text("the other theatre")
    text = str(tmp_path / "words.txt")
    assert main(["quality", "--model", str(place), "--precisions", "fp32", "--text", text]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "its tokenizer knows more tokens than it" in last


@pytest.fixture
def limited() -> Iterator[None]:
    """Fails a case that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_every_field_with_every_wrong_value_serves_or_is_refused(
    family: str, file: str, folder: Callable[[str], Path], limited: None
) -> None:
    place = folder(family)
    original = json.loads((place / file).read_text())
    more = [
        "head_dim",
        "n_inner",
        "sliding_window",
        "layer_types",
        "rope_parameters",
        "text_config",
        "num_labels",
    ]
    for key in [*original, *(more if file == "config.json" else [])]:
        for value in WRONG:
            (place / file).write_text(json.dumps({**original, key: value}))
            signal.alarm(30)
            refusal = outcome(place)
            assert "\n" not in refusal, (key, value)
            assert str(place) not in refusal, (key, value)


def outcome(folder: Path) -> str:
    """The message that refuses the folder, or an empty one if it is served."""
    try:
        checkpoint = open_checkpoint(str(folder))
        load_tokenizer(checkpoint)
        loaded = loaders.load("fp32", ModelSpec(checkpoint, slots=2))
    except LoaderError as error:
        return str(error)
    assert loaded.runner.score([0]).isfinite().all()
    loaded.close()
    return ""
