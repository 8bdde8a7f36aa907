"""Calibration samples: spread over the text, deterministic, and refused where a text is of no use."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loaders import calibration
from loaders.base import ModelSpec
from loaders.calibration import calibration_samples
from loaders.checkpoint import open_checkpoint
from loaders.texts.calibration import CalibrationError, calibration_text
from loaders.texts.corpus import held_out_text
from tests import checkpoints
from tests.checkpoints import byte_tokenizer


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("tiny"))
    return ModelSpec(open_checkpoint(str(folder)))


def on(spec: ModelSpec, folder: Path, content: str) -> ModelSpec:
    path = folder / "text.txt"
    path.write_text(content)
    return replace(spec, calibration=path)


def test_samples_are_spread_over_the_text(spec: ModelSpec, tmp_path: Path) -> None:
    words = " ".join(f"{number:05}" for number in range(2000))
    ids = byte_tokenizer()(words)["input_ids"]
    samples = calibration_samples(on(spec, tmp_path, words), 4, 60)
    assert samples.shape == (4, 60)
    assert samples.dtype == torch.int64
    assert samples[0].tolist() == ids[:60]
    assert samples[-1].tolist() == ids[-60:]
    texts = [byte_tokenizer().decode(sample) for sample in samples]
    assert [round(int(text.split()[1]) / 666) for text in texts] == [0, 1, 2, 3]


def test_a_long_text_is_read_in_parts(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_MOST", 6400)
    words = " ".join(f"{number:05}" for number in range(20_000))
    samples = calibration_samples(on(spec, tmp_path, words), 8, 60)
    numbers = [int(byte_tokenizer().decode(sample).split()[1]) for sample in samples]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 19_000


def test_a_short_text_gives_fewer_samples(spec: ModelSpec, tmp_path: Path) -> None:
    assert calibration_samples(on(spec, tmp_path, "xyz " * 50), 100, 64).shape == (3, 64)


def test_a_sample_is_no_longer_than_the_context(spec: ModelSpec) -> None:
    assert calibration_samples(replace(spec, context=32), 2, 512).shape == (2, 32)


def test_the_default_text_is_not_what_quality_is_measured_on() -> None:
    with calibration_text(None).open() as stream:
        text = stream.read().decode()
    assert len(text) > 500_000
    held_out = {one for one in held_out_text().split("\n\n") if len(one) > 80}
    assert not held_out & {*text.split("\n\n")}


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has 0 tokens; 64 are the fewest"), ("a few words", "has 11 tokens|are the fewest")],
)
def test_too_little_text_is_refused(spec: ModelSpec, tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_samples(on(spec, tmp_path, content), 4, 64)


def test_a_text_that_is_not_utf_8_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Grüße ".encode("latin-1") * 100)
    with pytest.raises(CalibrationError, match="is not UTF-8"):
        calibration_samples(replace(spec, calibration=path), 4, 64)


def test_a_text_of_unknown_words_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "rain": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    spec = ModelSpec(open_checkpoint(str(folder)))
    assert calibration_samples(on(spec, tmp_path, "the rain " * 100), 1, 8).tolist() == [[1, 2] * 4]
    with pytest.raises(CalibrationError, match="knows only 0 of the 200 tokens"):
        calibration_samples(on(spec, tmp_path, "der Regen " * 100), 1, 8)
