"""Stop strings in a text that arrives in pieces; they may contain the names of special tokens."""

from collections.abc import Sequence

# kinds of characters: of the text; the first of a hidden name; another of a hidden name
_SHOWN, _NAME, _INSIDE = "s", "n", "i"


class StopStrings:
    """Releases text up to the first stop string; holds back text that may be the beginning of one.

    Strings are searched in the visible text, and in the text with the names of special tokens. There a match
    contains whole names only: ``end`` does not match inside ``<|im_end|>``.

    Args:
        strings: not empty ones.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""  # text that is not released yet, with the names of special tokens
        self._kinds = ""  # the kind of each of its characters; empty while it has no name
        self.found = False
        """Whether a stop string was found."""

    def push(self, text: str, name: str = "", final: bool = False) -> str:
        """The visible text that is certain to precede every stop string.

        Args:
            text: the next visible text.
            name: of a special token that follows ``text``.
            final: the text ends here: all that is held back is released.
        """
        if not self._strings:
            return text
        if self.found:
            return ""
        if not name and not self._kinds:
            self._held += text
            return self._release_shown(final)
        self._kinds = (self._kinds or _SHOWN * len(self._held)) + _SHOWN * len(text)
        self._kinds += _NAME[: len(name)] + _INSIDE * (len(name) - 1)
        self._held += text + name
        return self._release_among_names(final)

    def _release_shown(self, final: bool) -> str:
        if places := [at for string in self._strings if (at := self._held.find(string)) >= 0]:
            self.found = True
            return self._held[: min(places)]
        cut = len(self._held) if final else _certain(self._held, self._strings)
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def _release_among_names(self, final: bool) -> str:
        places = [at for at, kind in enumerate(self._kinds) if kind == _SHOWN]
        shown = "".join(self._held[at] for at in places)
        places.append(len(self._held))
        one = _first(self._held, self._kinds, self._strings)
        other = _first(shown, _SHOWN * len(shown), self._strings)
        found = [at for at in (one, None if other is None else places[other]) if at is not None]
        if found:
            self.found = True
            cut = min(found)
        elif final:
            cut = len(self._held)
        else:
            cut = min(_certain(self._held, self._strings), places[_certain(shown, self._strings)])
            while self._kinds[cut : cut + 1] == _INSIDE:  # no match begins inside a name
                cut += 1
        released = shown[: self._kinds.count(_SHOWN, 0, cut)]
        self._held, self._kinds = self._held[cut:], self._kinds[cut:] if _NAME in self._kinds[cut:] else ""
        return released


def _first(text: str, kinds: str, strings: Sequence[str]) -> int | None:
    """The index of the first match; matches that begin or end inside a name don't count."""
    found = []
    for string in strings:
        at = text.find(string)
        while at >= 0 and _INSIDE in (kinds[at], kinds[at + len(string) : at + len(string) + 1]):
            at = text.find(string, at + 1)
        if at >= 0:
            found.append(at)
    return min(found, default=None)


def _certain(text: str, strings: Sequence[str]) -> int:
    """Characters before the first that may be the beginning of a string."""
    return len(text) - max(_overlap(text, string) for string in strings)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
