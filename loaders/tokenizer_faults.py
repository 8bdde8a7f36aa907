"""What goes wrong in a tokenizer, which is a program in Rust driven by a model's files."""

from collections.abc import Iterable

_PANIC = "pyo3_runtime"  # the class can't be imported: pyo3 makes it


def is_tokenizer_fault(error: BaseException) -> bool:
    """Whether ``error``, raised by a tokenizer, is its own: an exception or a panic of the library beneath.

    A panic is a ``BaseException`` beside ``Exception``; the library itself is as usable afterwards as before.
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
