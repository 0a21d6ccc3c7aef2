"""Stop strings across pieces, against the obvious slow search."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pagemill.text.stop import StopMatcher, StopPush


def slow(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first, the longest of those that end there; by trying every end and every stop."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            found = max(matches, key=len)
            return text[:end] if include else text[: end - len(found)], found
    return text, None


def run(pieces: Sequence[str], stops: Sequence[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(tuple(stops), include)
    text, stopped = "", None
    for piece in pieces:
        push = matcher.push(piece)
        text, stopped = text + push.text, push.stopped
    return text + matcher.flush(), stopped


WORDS = st.text("ab\né", max_size=6)


@given(st.lists(WORDS, max_size=12), st.lists(WORDS.filter(bool), max_size=5), st.booleans())
def test_any_cutting_gives_what_the_slow_search_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    assert run(pieces, stops, include) == slow("".join(pieces), stops, include)


@given(st.lists(WORDS, max_size=12), st.lists(WORDS.filter(bool), min_size=1, max_size=5))
def test_exactly_what_may_begin_a_stop_is_held_back(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, shown = StopMatcher(tuple(stops), False), "", ""
    for piece in pieces:
        push = matcher.push(piece)
        seen, shown = seen + piece, shown + push.text
        if push.stopped is not None:
            return
        may_begin = [n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert shown == seen[: len(seen) - max(may_begin, default=0)]


def test_a_stop_over_three_pieces_is_cut_from_the_text() -> None:
    matcher = StopMatcher(("\nUser:",), include=False)
    assert [matcher.push(p) for p in ("Hi.\nU", "se", "r: more")] == [
        StopPush("Hi."),
        StopPush(""),
        StopPush("", "\nUser:"),
    ]
    assert matcher.flush() == ""


def test_a_stop_may_stay_in_the_text() -> None:
    assert run(["one t", "wo three"], ["two"], include=True) == ("one two", "two")


def test_after_a_match_nothing_more_comes() -> None:
    matcher = StopMatcher(("x",), include=False)
    matcher.push("axb")
    assert matcher.push("more") == StopPush("", "x")
    assert matcher.flush() == ""


def test_a_false_beginning_is_given_back() -> None:
    matcher = StopMatcher(("abc",), include=False)
    assert [matcher.push(p).text for p in ("ab", "abx")] == ["", "ababx"]


def test_the_end_gives_back_what_was_held() -> None:
    matcher = StopMatcher(("</s>",), include=False)
    assert (matcher.push("a</").text, matcher.flush(), matcher.flush()) == ("a", "</", "")


def test_the_match_that_ends_first_wins_over_one_that_began_earlier() -> None:
    assert run(["abcd"], ["abcd", "bc"]) == ("a", "bc")


def test_of_matches_that_end_together_the_longest_wins() -> None:
    assert run(["xabc"], ["c", "abc", "bc"]) == ("x", "abc")


def test_without_stops_text_passes_at_once() -> None:
    assert StopMatcher((), include=False).push("anything") == StopPush("anything")


def test_the_largest_allowed_stops_are_matched() -> None:
    stops = tuple("a" * 1023 + chr(ord("b") + i) for i in range(16))
    assert run(["a" * 5000, "q", "rest"], stops) == ("a" * (5000 - 1023), stops[15])
