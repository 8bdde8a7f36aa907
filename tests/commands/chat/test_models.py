"""`bitdial chat --url` of a server with two models: which one answers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands.chat.conftest import Talk
from tests.conftest import serving, wait_until
from tests.two_models import Runners, is_ready, two_models

TalkTo = Callable[..., Talk]


@pytest.fixture
def runners() -> Runners:
    return {}


@pytest.fixture
def url(tmp_path: Path, template: Path, runners: Runners) -> Iterator[str]:
    """Of two models, which only the small one of can chat."""
    with serving(app := two_models(tmp_path, runners, {"chat_template": template})) as address:
        wait_until(lambda: is_ready(app))
        yield address


def test_the_model_changes_in_mid_conversation(url: str, talk: TalkTo) -> None:
    done = talk("hi", "/model owner/small", "hi", "/model large", "hi", url=url, max_new_tokens=3)
    assert done == Talk("aaa\nbbb\naaa\n", "", 0)


def test_the_models_are_listed_with_a_mark(url: str, talk: TalkTo) -> None:
    done = talk("/model", "/model small", "/model", url=url)
    assert done.out.splitlines() == ["▸ large", "  owner/small", "  large", "▸ owner/small"]


def test_a_model_is_named_with_its_precision(url: str, talk: TalkTo, runners: Runners) -> None:
    done = talk("hi", "/model large:fp16", "hi", url=url, max_new_tokens=3, model="small:bf16")
    assert done == Talk("bbb\naaa\n", "", 0)
    assert runners["small", "bf16"].batches
    assert runners["large", "fp16"].batches


def test_after_an_error_it_goes_on_as_before(url: str, talk: TalkTo) -> None:
    done = talk("/model medium", "hi", "/model small:int3", "hi", url=url, max_new_tokens=3)
    assert done.out == "aaa\naaa\n"
    assert "no such model here; this server has large, owner/small" in done.err
    assert done.code == 1


def test_stats_and_precisions_are_those_of_the_model(url: str, talk: TalkTo) -> None:
    done = talk("/model small", "/precision", "/stats", url=url)
    assert "bf16              unloaded" in done.out
    assert "\nfp32" in done.out
    assert "\nbf16 " not in done.out.partition("tok/s")[2]
