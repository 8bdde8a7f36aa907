"""Errors of a tokenizer, whose code in Rust runs on a model's files."""

from collections.abc import Iterable

_PANIC = "pyo3_runtime"  # pyo3 creates the class at run time; it can't be imported


def is_tokenizer_fault(error: BaseException) -> bool:
    """Whether an error from a call of a tokenizer is its own: an exception, or a panic of its library.

    A panic is a ``BaseException`` but no ``Exception``; the library remains usable after it.
    """
    return isinstance(error, Exception) or type(error).__module__ == _PANIC


def unknown_token(ids: Iterable[int], vocabulary: int, text: str) -> str | None:
    """Why a model of so many tokens can't read these ids; None where it can.

    Args:
        text: what the ids are of, as the sentence names it.
    """
    largest = max(ids, default=0)
    if largest < vocabulary:
        return None
    return f"the model has no token {largest} of {text}: its tokenizer knows more tokens than it"
