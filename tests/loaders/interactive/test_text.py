"""``loaders.load`` with a model's name, and text continued in Python."""

from dataclasses import replace

import pytest

import loaders
from loaders.base import LoadedModel, ModelSpec
from loaders.checkpoint import load_tokenizer, open_checkpoint
from loaders.errors import ModelNotFound, UnknownPrecision
from loaders.quality.greedy import continuations
from tests.fakes import fake_model

PROMPT = "The file object has a method that"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaders.load("fp32", "bundled")


def test_the_text_is_the_greedy_continuation_without_the_prompt(model: LoadedModel) -> None:
    ids = model.tokenizer(PROMPT)["input_ids"]
    (expected,) = continuations(model.runner, [ids], 12, 1)
    text = model.generate(PROMPT, max_new_tokens=12)
    assert model.tokenizer.decode([*ids, *expected]) == PROMPT + text
    assert model.generate(PROMPT, max_new_tokens=12) == text


def test_a_prompt_of_several_chunks_is_continued_as_one(model: LoadedModel) -> None:
    ids = model.tokenizer(PROMPT * 30)["input_ids"]
    assert len(ids) > 128
    (expected,) = continuations(model.runner, [ids], 8, 1)
    assert model.tokenizer.decode([*ids, *expected]) == PROMPT * 30 + model.generate(PROMPT * 30, 8)


def test_an_end_token_ends_the_text_and_is_not_in_it(model: LoadedModel) -> None:
    ids = model.tokenizer(PROMPT)["input_ids"]
    ((*before, end),) = continuations(model.runner, [ids], 3, 1)
    assert model.spec is not None
    ended = replace(model.spec.checkpoint, eos_ids=frozenset({end}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "spec", replace(model.spec, checkpoint=ended))
        text = model.generate(PROMPT, 20)
    assert PROMPT + text == model.tokenizer.decode([*ids, *before])


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    [("", 4, "no tokens"), (PROMPT, 0, "at least 1"), (PROMPT, 10_000, "don't fit into the context of 512")],
)
def test_what_cannot_be_continued_is_a_value_error(
    model: LoadedModel, text: str, tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(text, tokens)


def test_a_specification_and_a_name_load_the_same_model(model: LoadedModel) -> None:
    spec = ModelSpec(open_checkpoint("bundled"), slots=1)
    other = loaders.load("fp32", spec)
    assert other.spec is spec
    assert other.footprint == model.footprint
    assert other.generate(PROMPT, 8) == model.generate(PROMPT, 8)
    assert load_tokenizer(spec.checkpoint).vocab_size == other.tokenizer.vocab_size


def test_an_unknown_model_and_an_unknown_precision_say_so() -> None:
    with pytest.raises(ModelNotFound):
        loaders.load("fp32", "/no/such/folder")
    with pytest.raises(UnknownPrecision, match="choose from fp32, bf16"):
        loaders.load("int3", "/no/such/folder")


def test_a_model_made_without_load_has_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="checkpoint is not known"):
        fake_model().generate("x")
