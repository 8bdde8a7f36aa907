from itertools import accumulate

from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.service.text.stop_strings import StopStrings

pieces = st.lists(st.tuples(st.text("ab<", max_size=3), st.sampled_from(["", "", "<a>", "<b>"])), max_size=8)
stops = st.lists(st.text("ab<", min_size=1, max_size=3) | st.sampled_from(["<a>", "<a>b", "a<b>", "<a><b>"]))


def ends(text: str, names: list[tuple[int, str]], stop: str) -> bool:
    """Whether the text, with a name before each of its characters given, has the stop string in it."""
    whole, cuts = "", set[int]()
    for at, character in enumerate([*text, ""]):
        for place, name in names:
            if place == at:
                cuts |= set(range(len(whole) + 1, len(whole) + len(name)))
                whole += name
        whole += character
    places = [at for at in range(len(whole)) if whole.startswith(stop, at)]
    return stop in text or any(not {at, at + len(stop)} & cuts for at in places)


@given(pieces, stops)
@example([("a", "<a>"), ("b", "")], ["ab"])
@example([("a", "<a>"), ("b", "")], ["<a>b"])
@example([("x", "<a>"), ("", "<b>")], ["<a><b>"])
@settings(max_examples=150, deadline=None)
def test_nothing_of_a_stop_string_leaks(said: list[tuple[str, str]], strings: list[str]) -> None:
    matcher = StopStrings(strings)
    released = [matcher.push(text, name) for text, name in said]
    before = matcher.found
    released.append(matcher.push("", final=True))
    shown = "".join(text for text, _ in said)
    places = accumulate(len(text) for text, _ in said)
    names = [(place, name) for place, (_, name) in zip(places, said, strict=True) if name]
    assert before == matcher.found == any(ends(shown, names, stop) for stop in strings)
    joined = "".join(released)
    assert shown.startswith(joined)
    assert not any(stop in joined for stop in strings)
    if not matcher.found:
        assert joined == shown


def test_a_name_is_matched_whole_or_not_at_all() -> None:
    for stop, found in (
        ("<|im_end|>", True),
        ("a<|im_end|>", True),
        ("end", False),
        ("a<", False),
        ("|>", False),
        (">b", False),
        (">>>", False),
    ):
        matcher = StopStrings([stop])
        released = [matcher.push("a", "<|im_end|>"), matcher.push("b"), matcher.push("", final=True)]
        assert (matcher.found, "".join(released)) == (
            found,
            ("" if stop[0] == "a" else "a") if found else "ab",
        )
