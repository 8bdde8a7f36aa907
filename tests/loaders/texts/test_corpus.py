import pytest

from loaders.texts import corpus


def paragraphs(text: str) -> set[str]:
    return {normal for piece in text.split("\n\n") if len(normal := " ".join(piece.split())) >= 30}


def test_the_split_is_by_name_and_nothing_held_out_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, library = corpus.held_out_text(), corpus.library
    # all that is held out, and of the rest what begins with a … c: to parse everything takes long
    monkeypatch.setattr(
        corpus, "library", lambda: library(lambda name: corpus.is_held_out(name) or name < "library:d")
    )
    documents = corpus.training_documents()
    assert {document.kind for document in documents} == {"topic", "docstrings", "source"}
    assert not any(corpus.is_held_out(document.name) for document in documents)
    assert len(held_out) > 50_000
    assert not paragraphs(held_out) & paragraphs("\n\n".join(document.text for document in documents))


def test_a_file_and_its_docstrings_are_held_out_together() -> None:
    kinds: dict[str, set[str]] = {}
    for document in corpus.library(corpus.is_held_out):
        assert corpus.is_held_out(document.name)
        kinds.setdefault(document.name, set()).add(document.kind)
    assert any(found == {"docstrings", "source"} for found in kinds.values())
