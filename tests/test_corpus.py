from loaders import corpus


def test_the_split_is_by_name_and_nothing_held_out_is_trained_on() -> None:
    held_out = corpus.held_out_text()
    documents = corpus.training_documents()
    assert not any(corpus.is_held_out(document.name) for document in documents)
    assert len(held_out) > 50_000
    training = {" ".join(p.split()) for d in documents if d.kind == "topic" for p in d.text.split("\n\n")}
    shared = [
        p
        for p in held_out.split("\n\n")
        if len(" ".join(p.split())) >= 30 and " ".join(p.split()) in training
    ]
    assert shared == []


def test_a_file_and_its_docstrings_are_held_out_together() -> None:
    kinds: dict[str, set[str]] = {}
    for document in corpus.library():
        kinds.setdefault(document.name, set()).add(document.kind)
    assert any(found == {"docstrings", "source"} for found in kinds.values())
