"""The sizes of captured steps, and the one that a step uses; all are fixed before the first step."""

from collections.abc import Sequence

_ALIGNMENT = 16  # columns: attention kernels take a multiple of it without padding the mask
_SHORTEST = 256  # columns of the shortest view of the cache
_DENSE = 2048  # above it sizes grow by a factor of four, since long contexts would need too many graphs
_PROMPT = 128


def columns_for(context: int) -> int:
    """Columns of a slot that holds ``context`` tokens."""
    return -(-context // _ALIGNMENT) * _ALIGNMENT


def batch_sizes(slots: int, batch_invariant: bool) -> tuple[int, ...]:
    """Rows of the captured decode steps, ascending: powers of two up to all slots.

    Args:
        batch_invariant: only all slots at once, so that the result of a row doesn't depend on the batch.
    """
    if batch_invariant:
        return (slots,)
    sizes = [1]
    while sizes[-1] * 2 < slots:
        sizes.append(sizes[-1] * 2)
    return tuple(dict.fromkeys((*sizes, slots)))


def contexts(context: int) -> tuple[int, ...]:
    """Numbers of columns that a step may attend to, ascending; the last is all of them."""
    whole, sizes, size = columns_for(context), [], _SHORTEST
    while size < whole:
        sizes.append(size)
        size *= 2 if size < _DENSE else 4
    return (*sizes, whole)


def prompt_sizes(context: int, batch_invariant: bool) -> tuple[int, ...]:
    """Tokens of the prefill steps, ascending; longer prompts take several of the largest.

    Args:
        batch_invariant: one size, so that the result of a token doesn't depend on the chunks of its prompt.
    """
    largest = min(_PROMPT, columns_for(context))
    if batch_invariant:
        return (largest,)
    return (*(size for size in (16, 32, 64) if size < largest), largest)


def smallest(sizes: Sequence[int], wanted: int) -> int:
    """The first of the ascending sizes that is at least ``wanted``.

    Raises:
        ValueError: there is none.
    """
    for size in sizes:
        if size >= wanted:
            return size
    raise ValueError(f"{wanted} is more than {sizes[-1]}")
