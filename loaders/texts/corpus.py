"""The text in every CPython installation, split into training and held-out documents.

The bundled model is trained on it (``scripts/train_bundled.py``), and quality is measured on its
held-out part, so no text needs to be committed or downloaded. A document is held out by its *name*
(a topic of ``pydoc_data.topics`` or a standard-library file), never by position: the split survives
a new Python version, where texts grow and shift but keep their names.
"""

import ast
import gc
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["topic", "docstrings", "source"]

HELD_OUT_ONE_IN = 16
_SKIPPED_DIRECTORIES = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data",
    "encodings", "ensurepip", "turtledemo", "lib2to3",
}  # fmt: skip
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""The fields of statements that hold statements, in the order of every node's own fields."""


@dataclass(frozen=True)
class Document:
    """One named text: a help topic, the docstrings of one file, or one file's source."""

    name: str
    kind: Kind
    text: str


def is_held_out(name: str) -> bool:
    """Whether the document of this name is held out; about one in sixteen is."""
    digest = hashlib.sha256(name.encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def topics() -> Iterator[Document]:
    """Python's reference manual, one document per help topic."""
    from pydoc_data.topics import topics as texts

    for name, text in sorted(texts.items()):
        yield Document(f"topic:{name}", "topic", text.strip() + "\n")


def library(wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Document]:
    """Yields for each standard-library file its docstrings and its source, under the same name.

    Both have one name, since the source contains the docstrings: they are held out together or not at all.

    Args:
        wanted: selects documents by name; other files are not read.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _python_files(root):
        relative = path.relative_to(root)
        name = f"library:{relative.as_posix()}"
        if not wanted(name):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = _parsed(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        docstrings = _docstrings(tree, relative.with_suffix("").as_posix().replace("/", "."))
        if docstrings:
            yield Document(name, "docstrings", docstrings)
        yield Document(name, "source", source.strip() + "\n")


def _parsed(source: str) -> ast.Module:
    """The tree, made without garbage collections, of which its many nodes would cause ever more."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    finally:
        if collects:
            gc.enable()


def _python_files(root: Path) -> list[Path]:
    """In the order of their paths. Skipped directories have most of the files and aren't read."""
    found: list[Path] = []
    for folder, directories, files in os.walk(root):
        directories[:] = (name for name in directories if name not in _SKIPPED_DIRECTORIES)
        found += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found)


def _docstrings(tree: ast.Module, module: str) -> str:
    """Every docstring below its signature, as in ``help()``."""
    parts: list[str] = []
    if text := ast.get_docstring(tree):
        parts.append(f"{module}\n\n{text}")
    for node in _statements(tree):
        if isinstance(node, ast.ClassDef) and (text := ast.get_docstring(node)):
            parts.append(f"class {node.name}\n\n{text}")
        elif isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            parts.append(f"{node.name}({ast.unparse(node.args)})\n\n{text}")
    return "\n\n".join(parts) + "\n" if parts else ""


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """In the order of ``ast.walk``, which also visits the expressions: nine nodes in ten."""
    level: list[ast.AST] = [tree]
    while level:
        yield from level
        level = [inner for node in level for field in _BLOCKS for inner in getattr(node, field, ())]


def held_out_text() -> str:
    """The held-out prose, topics and docstrings: the default text of quality measurements."""
    documents = [
        *(document for document in topics() if is_held_out(document.name)),
        *(document for document in library(is_held_out) if document.kind == "docstrings"),
    ]
    return "\n\n".join(document.text for document in documents)


def training_documents() -> list[Document]:
    """Every document that is not held out, without the paragraphs that also occur in held-out ones.

    Help topics quote each other (``for`` is a section of ``compound``); a paragraph seen in training
    would make the held-out perplexity look better than it is.
    """
    everything = [*topics(), *library()]
    reserved = {
        paragraph
        for document in everything
        if is_held_out(document.name)
        for paragraph in _paragraphs(document.text)
    }
    kept: list[Document] = []
    for document in everything:
        if is_held_out(document.name):
            continue
        pieces = re.split(r"(\n\s*\n)", document.text)
        text = "".join(piece for piece in pieces if _normal(piece) not in reserved)
        kept.append(Document(document.name, document.kind, text))
    return kept


def _paragraphs(text: str) -> Iterator[str]:
    for piece in re.split(r"\n\s*\n", text):
        if len(normal := _normal(piece)) >= 30:  # shorter ones ("Examples:") occur everywhere
            yield normal


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())
