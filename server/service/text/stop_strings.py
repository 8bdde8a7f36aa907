"""Stop strings in a text that comes in pieces; they may name special tokens, which the text doesn't show."""

from collections.abc import Sequence

# what a character is: one of the text; the first of a hidden name; another of it
_SHOWN, _NAME, _INSIDE = "s", "n", "i"


class StopStrings:
    """Releases text up to the first stop string and holds back what may yet begin one.

    A string is looked for in the text as it is shown, and in the text with the special tokens' names in it,
    of which it must have all or nothing: ``end`` is not found in ``<|im_end|>``.

    Args:
        strings: none is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""  # not released yet, the names of special tokens among it
        self._kinds = ""  # what each of its characters is; nothing where no name is among them
        self.found = False
        """Whether one has come."""

    def push(self, text: str, name: str = "", final: bool = False) -> str:
        """The shown text that is certain to come before any stop string.

        Args:
            text: what is shown next.
            name: of a special token that comes after it.
            final: nothing more will come: what was held back is released.
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
            while self._kinds[cut : cut + 1] == _INSIDE:  # no string begins inside a name
                cut += 1
        released = shown[: self._kinds.count(_SHOWN, 0, cut)]
        self._held, self._kinds = self._held[cut:], self._kinds[cut:] if _NAME in self._kinds[cut:] else ""
        return released


def _first(text: str, kinds: str, strings: Sequence[str]) -> int | None:
    """Where the first of the strings begins; one that would begin or end inside a name doesn't count."""
    found = []
    for string in strings:
        at = text.find(string)
        while at >= 0 and _INSIDE in (kinds[at], kinds[at + len(string) : at + len(string) + 1]):
            at = text.find(string, at + 1)
        if at >= 0:
            found.append(at)
    return min(found, default=None)


def _certain(text: str, strings: Sequence[str]) -> int:
    """How much of a text none of the strings can begin in."""
    return len(text) - max(_overlap(text, string) for string in strings)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
