"""MODELS: names, revisions and chat templates of several models, and what contradicts them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from loaders.base import Checkpoint
from loaders.checkpoint import open_checkpoint
from server.__main__ import main
from server.served_model import Wanted
from tests import checkpoints

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
Served = Callable[..., list[Wanted]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """The models that a command line of ``bitdial serve`` would serve."""
    found: list[Wanted] = []

    def create_app(settings: Any, first: Wanted, others: list[Wanted]) -> FastAPI:
        found[:] = [first, *others]
        return FastAPI()

    class Process:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def serve_forever(self) -> int:
            return 0

    monkeypatch.setattr("server.app.create_app", create_app)
    monkeypatch.setattr("server.http.server.Process", Process)
    monkeypatch.setattr("os._exit", sys.exit)

    def serve(*arguments: str) -> list[Wanted]:
        with pytest.raises(SystemExit, match="0"):
            main(["serve", "--device", "cpu", *arguments])
        return found

    return serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, str | None]]:
    """A hub whose every model is the small one; the downloads by id and revision."""
    asked: list[tuple[str, str | None]] = []

    def download(model_id: str, revision: str | None, **_: Any) -> str:
        asked.append((model_id, revision))
        return str(folder)

    monkeypatch.setattr("loaders.hub.snapshot_download", download)
    return asked


def test_an_entry_names_its_revision(served: Served, hub: list[Any]) -> None:
    models = served("--models", "owner/one@v1.0, old=owner/one@refs/pr/2,owner/two,bundled")
    assert hub == [("owner/one", "v1.0"), ("owner/one", "refs/pr/2"), ("owner/two", None)]
    assert [one.name for one in models] == ["owner/one", "old", "owner/two", "bundled"]
    assert [one.settings.revision for one in models] == ["v1.0", "refs/pr/2", None, None]
    assert [one.settings.model_id for one in models] == ["owner/one", "owner/one", "owner/two", "bundled"]


def test_a_folder_is_a_folder_whatever_its_name(
    served: Served, hub: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "tiny@v2").symlink_to(folder)
    assert [one.name for one in served("--models", "tiny@v2,owner/own=./tiny@v2")] == ["tiny", "owner/own"]
    assert hub == []


def test_a_chat_template_is_of_the_model_that_it_names(served: Served, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    models = served("--models", f"{folder},bundled", "--chat-template", f"tiny={file}")
    assert [one.settings.chat_template for one in models] == [file, None]


def test_a_saved_model_beside_others_has_its_own_precision(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(model_id: str, *_: Any) -> Checkpoint:
        found = open_checkpoint(model_id)
        return found if model_id == "bundled" else replace(found, saved="int4")

    monkeypatch.setattr("loaders.checkpoint.open_checkpoint", opened)
    given = ("--precisions", "fp32,nf4", "--shadow-precision", "bf16")
    models = served("--models", f"bundled,{folder}", *given)
    assert [one.settings.first_precisions() for one in models] == [("fp32", "nf4", "bf16"), ("int4",)]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--models", "bundled,bundled"), "--models (or MODELS): two models are named bundled"),
        (("--models", "a=bundled,a=gpt2"), "a name is given twice"),
        (("--models", "a b=bundled"), "'a b' is no name"),
        (("--models", "a/b/c=bundled"), "'a/b/c' is no name"),
        (("--models", "mod\u00e8le=bundled"), "is no name"),
        (("--models", "=bundled"), "it must be models by comma"),
        (("--models", "bundled,,gpt2"), "it must be models by comma"),
        (("--models", "owner/one@"), "it must be models by comma"),
        (("--models", "bundled", "--model", "gpt2"), "--model is of one model"),
        (("--models", "bundled", "--revision", "main"), "write owner/name@revision"),
        (("--models", "bundled", "--chat-template", "x.jinja"), "it must be name=FILE"),
        (("--models", "bundled", "--chat-template", "gpt2=x"), "no model is named 'gpt2'; the models are"),
        (("--models", "bundled", "--chat-template", "bundled=a,bundled=b"), "two files for bundled"),
        (("--models", "bundled", "--chat-template", "bundled=nowhere"), "'nowhere': it can't be read"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_one_line(
    arguments: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line


def test_a_name_may_not_be_anothers_in_a_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundled:nf4").mkdir()
    assert main(["serve", "--models", f"bundled,{tmp_path / 'bundled:nf4'}"]) == 2
    assert "bundled:nf4 would be bundled in the precision nf4" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["bundled@main", "bundled"])
def test_what_is_not_of_the_hub_has_no_revision(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--models", model] if "@" in model else ["--model", model, "--revision", "main"]
    assert main(["serve", *flags]) == 1
    assert "the bundled model has no revision 'main'" in capsys.readouterr().err.splitlines()[-1]


def test_two_models_that_do_not_fit_beside_each_other_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["serve", "--device", "cpu", "--models", f"{folder},bundled", "--memory-budget"]
    assert main([*models, "11MB"]) == 2
    assert "no room for bundled:fp32 beside tiny:fp32: they need" in capsys.readouterr().err.splitlines()[-1]
