"""The incremental detokeniser against the decoding of everything at once."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pagemill.text.stream import IncrementalDetokenizer

HIDDEN = b""


class Vocabulary:
    """Tokens as bytes. drop_space: as SentencePiece, a space at the very beginning is left out."""

    def __init__(self, tokens: Sequence[bytes], drop_space: bool = False) -> None:
        self.tokens, self.drop_space, self.longest = tokens, drop_space, 0

    def decode(self, ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(ids))
        raw = b"".join(self.tokens[i] for i in ids)
        return raw[self.drop_space and raw.startswith(b" ") :].decode(errors="replace")


def stream(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(vocabulary.decode)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


TOKENS = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=4),
        st.sampled_from(["é", "€", "😀𝔘", "a\ufffd", "字\u0301"]).map(str.encode),
        st.sampled_from(
            [HIDDEN, b" ", b" a", b"\xf0", b"\x9f", b"\x98\x80", b"\xe2\x82", b"\xff", b"\x80", b"\xed\xa0"]
        ),
    ),
    min_size=1,
    max_size=60,
)


@given(TOKENS, st.booleans())
def test_all_deltas_are_the_whole_text(tokens: list[bytes], drop_space: bool) -> None:
    vocabulary = Vocabulary(tokens, drop_space)
    ids = range(len(tokens))
    assert "".join(stream(vocabulary, ids)) == Vocabulary(tokens, drop_space).decode(ids)


@given(st.lists(st.integers(0, 255), max_size=120), st.booleans())
def test_single_bytes_in_any_order_are_the_whole_text(ids: list[int], drop_space: bool) -> None:
    tokens = [bytes([i]) for i in range(256)]
    assert "".join(stream(Vocabulary(tokens, drop_space), ids)) == Vocabulary(tokens, drop_space).decode(ids)


@given(st.text(max_size=40))
def test_valid_text_never_shows_a_replacement_character_before_its_end(text: str) -> None:
    tokens = [bytes([i]) for i in range(256)]
    deltas = stream(Vocabulary(tokens), text.encode())
    assert "".join(deltas) == text
    assert "\ufffd" in text or all("\ufffd" not in delta for delta in deltas)


@given(TOKENS, st.integers(0, 60))
def test_what_was_given_is_a_beginning_of_every_later_text(tokens: list[bytes], cut: int) -> None:
    given_so_far = "".join(stream(Vocabulary(tokens), range(len(tokens)))[: min(cut, len(tokens))])
    assert Vocabulary(tokens).decode(range(len(tokens))).startswith(given_so_far)


def test_a_character_comes_with_its_last_byte() -> None:
    assert stream(Vocabulary([bytes([b]) for b in "a😀b".encode()]), range(6)) == ["a", "", "", "", "😀", "b", ""]


def test_an_invalid_byte_appears_when_the_next_token_proves_it() -> None:
    assert stream(Vocabulary([b"a", b"\xff", b"b"]), range(3)) == ["a", "", "\ufffdb", ""]


def test_an_incomplete_character_at_the_end_is_flushed_as_one_replacement() -> None:
    assert stream(Vocabulary([b"a", b"\xf0\x9f", b"\x98"]), range(3)) == ["a", "", "", "\ufffd"]


def test_a_second_flush_gives_nothing() -> None:
    detokenizer = IncrementalDetokenizer(Vocabulary([b"\xf0"]).decode)
    assert [detokenizer.push(0), detokenizer.flush(), detokenizer.flush()] == ["", "\ufffd", ""]


def test_hidden_tokens_before_the_first_word_do_not_cost_a_second_space() -> None:
    assert (
        "".join(stream(Vocabulary([HIDDEN, b" ", b" a", HIDDEN, b" b"], drop_space=True), [0, 1, 0, 2, 3, 4])) == " a b"
    )


def test_the_work_of_a_push_does_not_grow_with_the_text() -> None:
    for token in (b"word ", b"\xff", b"\xf0", HIDDEN, b" "):
        vocabulary = Vocabulary([token], drop_space=True)
        stream(vocabulary, [0] * 2000)
        assert vocabulary.longest <= 17
