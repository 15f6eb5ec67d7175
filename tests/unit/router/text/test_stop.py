from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.stop import StopMatcher

few_letters = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def cut(text: str, stop_strings: list[str], splits: list[int]) -> tuple[str, bool]:
    """Push ``text`` in pieces; return the result and whether a stop string matched."""
    matcher = StopMatcher(stop_strings)
    bounds = [0, *sorted(min(split, len(text)) for split in splits), len(text)]
    out = "".join(matcher.push(text[start:end]) for start, end in itertools.pairwise(bounds))
    return out + matcher.flush(), matcher.matched


def expected(text: str, stop_strings: list[str]) -> tuple[str, bool]:
    """Return what ``cut`` must return. Find the first prefix that ends with a stop string."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


@given(few_letters, stops, st.lists(st.integers(0, 30), max_size=10))
def test_the_result_depends_on_the_text_and_not_on_the_pieces(
    text: str, stop_strings: list[str], splits: list[int]
) -> None:
    assert cut(text, stop_strings, splits) == expected(text, stop_strings)


@pytest.mark.parametrize("split", range(len("stop here<END>more") + 1))
def test_a_stop_string_at_every_split(split: int) -> None:
    assert cut("stop here<END>more", ["<END>"], [split]) == ("stop here", True)


def test_only_text_that_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["<END>"])
    assert matcher.push("a <E") == "a "
    assert matcher.push("x <") == "<Ex "
    assert matcher.push("b") == "<b"
    assert matcher.flush() == ""


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.matched
    assert matcher.push("c") == ""
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
