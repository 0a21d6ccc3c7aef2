"""The default model's tokeniser against stored ids of another engine on the same file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.models.checkpoint import open_checkpoint
from pagemill.text.remembered import RememberingEncoder
from pagemill.text.stream import IncrementalDetokenizer
from pagemill.text.tokenizer import Tokenizer, build_tokenizer
from tests.fixtures.default_model import default_model_path

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2-token-ids.json"

pytestmark = pytest.mark.model


@cache
def tokenizer() -> Tokenizer:
    return build_tokenizer(open_checkpoint(default_model_path()).vocab)


def test_every_text_gives_the_ids_of_llama_cpp() -> None:
    cases = json.loads(GOLDEN.read_text())["cases"]
    # A third column: the ids with control tokens read as text, where they differ.
    wrong = [text for text, ids, *_ in cases if tokenizer().encode(text) != ids]
    wrong += [text for text, *ids in cases if tokenizer().encode(text, parse_special=False) != ids[-1]]
    assert len(cases) >= 400
    assert wrong == []


def test_control_and_stop_tokens_are_the_files() -> None:
    assert tokenizer().vocab_size == 49152
    assert tokenizer().special_ids == frozenset(range(17))
    assert tokenizer().stop_ids == {0, 2}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_but_for_bytes_that_the_vocabulary_lacks(text: str) -> None:
    spelled = bytes(byte for byte in text.encode() if byte not in tokenizer().unknown_bytes)
    assert tokenizer().decode(tokenizer().encode(text), skip_special=False) == spelled.decode(errors="replace")


def test_a_stream_is_the_whole_text() -> None:
    text = "👩‍👩‍👧 naïve 日本語\n\n" * 40
    stream = IncrementalDetokenizer(tokenizer().decode)
    assert "".join([*map(stream.push, tokenizer().encode(text)), stream.flush()]) == text


def test_a_text_in_pieces_has_the_ids_of_the_whole() -> None:
    assert tokenizer().cuts_at_words
    encoder = RememberingEncoder(tokenizer())
    documents = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    text = "<|im_start|>user\n".join(each.read_text(encoding="utf-8") for each in documents)
    for length in (2000, 9000, 9000, len(text)):
        assert encoder.encode(text[:length], add_special=False) == tokenizer().encode(text[:length])
