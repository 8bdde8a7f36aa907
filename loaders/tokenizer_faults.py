"""What goes wrong in a tokenizer, which is a program in Rust driven by a model's files."""

_PANIC = "pyo3_runtime"  # the class can't be imported: pyo3 makes it


def is_tokenizer_fault(error: BaseException) -> bool:
    """Whether ``error``, raised by a tokenizer, is its own: an exception or a panic of the library beneath.

    A panic is a ``BaseException`` beside ``Exception``; the library itself is as usable afterwards as before.
    """
    return isinstance(error, Exception) or type(error).__module__ == _PANIC
