"""Errors of a tokenizer, whose code in Rust runs on a model's files."""

_PANIC = "pyo3_runtime"  # pyo3 creates the class at run time; it can't be imported


def is_tokenizer_fault(error: BaseException) -> bool:
    """Whether an error from a call of a tokenizer is its own: an exception, or a panic of its library.

    A panic is a ``BaseException`` but no ``Exception``; the library remains usable after it.
    """
    return isinstance(error, Exception) or type(error).__module__ == _PANIC
