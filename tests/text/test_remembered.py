"""Encoding piece by piece gives the ids of encoding at once, and encodes nothing twice."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagemill.base.errors import RequestError
from pagemill.text import remembered
from pagemill.text.pretokenizers import PRE_TOKENIZERS
from pagemill.text.remembered import WORD_END, RememberingEncoder
from pagemill.text.tokenizer import build_tokenizer
from tests.text.vocabularies import byte_level, sentencepiece

TOKENIZERS = {name: build_tokenizer(byte_level(name)) for name in sorted(PRE_TOKENIZERS)}
WORDS = ["hello", "world", "wor", "I", "don't", "'s", "the", "12", "12345", "é", "数字", "<tool>", "<|eos|>", "_x", "a"]
GAPS = [" ", " ", " ", "  ", "\n", " \n\n ", "\t", "", "\u00a0", "...", "/", "-"]
TEXTS = st.lists(st.sampled_from(WORDS + GAPS) | st.text(max_size=4), max_size=60).map("".join)
LONG = "the wheel turns and the stones grind what the miller brings to the mill in the morning " * 40


class Counting:
    """A tokeniser that counts what it is given. Mutated by `encode`. num_characters: in all."""

    cuts_at_words = True

    def __init__(self) -> None:
        self.num_characters = 0

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        self.num_characters += len(text)
        return TOKENIZERS["smollm"].encode(text, add_special=add_special, parse_special=parse_special)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_wherever_it_cuts_the_ids_are_those_of_the_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.cuts_at_words
    ends = [0, *(found.end() for found in WORD_END.finditer(text)), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(ends)]
    whole = tokenizer.encode(text, add_special=False)
    assert [token for piece in pieces for token in tokenizer.encode(piece, add_special=False)] == whole


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_a_growing_text_has_the_ids_of_encoding_it_anew(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "PIECE_CHARACTERS", 8)
        tokenizer = TOKENIZERS["smollm"]
        encoder, text = RememberingEncoder(tokenizer), ""
        for more in texts:
            text += more
            assert encoder.encode(text, add_special=False) == tokenizer.encode(text, add_special=False)


def test_only_what_is_new_is_encoded() -> None:
    counting = Counting()
    encoder = RememberingEncoder(counting)
    encoder.encode(LONG, add_special=False)
    assert counting.num_characters == len(LONG)
    encoder.encode(LONG + "and the wheel rests", add_special=False)
    assert counting.num_characters < len(LONG) + 2 * remembered.PIECE_CHARACTERS
    encoder.forget()
    encoder.encode(LONG, add_special=False)
    assert counting.num_characters > 2 * len(LONG)


def test_a_copy_remembers_and_goes_its_own_way() -> None:
    counting = Counting()
    encoder = RememberingEncoder(counting)
    encoder.encode(LONG, add_special=False)
    other = encoder.copy()
    encoder.forget()
    before = counting.num_characters
    assert other.encode(LONG, add_special=False) == TOKENIZERS["smollm"].encode(LONG, add_special=False)
    assert counting.num_characters - before < 2 * remembered.PIECE_CHARACTERS


def test_no_more_is_remembered_than_the_last_text() -> None:
    encoder = RememberingEncoder(Counting())
    for number in range(20):
        encoder.encode(f"text {number} about {LONG}", add_special=False)
    assert sum(map(len, encoder._pieces)) <= len(LONG) + 20


@pytest.mark.parametrize("text", ["the ", "a <b", "x y z"])
def test_a_vocabulary_with_tokens_across_words_is_not_cut(text: str) -> None:
    vocab = byte_level("gpt-2")
    crossing = replace(vocab, tokens=(*vocab.tokens[:-1], text))
    tokenizer = build_tokenizer(crossing)
    assert not tokenizer.cuts_at_words
    again = LONG + text + LONG
    assert RememberingEncoder(tokenizer).encode(again, add_special=False) == tokenizer.encode(again, add_special=False)


def test_other_kinds_of_tokenisers_are_not_cut() -> None:
    assert not build_tokenizer(sentencepiece()).cuts_at_words


def test_half_a_surrogate_pair_is_refused_with_its_place_in_the_text() -> None:
    with pytest.raises(RequestError, match=f"at character {len(LONG)}"):
        RememberingEncoder(TOKENIZERS["smollm"]).encode(LONG + "\ud800" + LONG, add_special=False)


def test_places_to_cut_are_found_in_ordinary_text() -> None:
    assert [found.end() for found in WORD_END.finditer("one two, Three four5 six\nseven eight")] == [3, 14, 30]
    assert not re.search(WORD_END, "ONE TWO  three\tfour 五 six 7")
