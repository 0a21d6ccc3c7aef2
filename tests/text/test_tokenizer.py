"""Tokenisers from vocabulary lists and from tokenizer.json: ids, bytes, round trips, refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.base.errors import ModelError, RequestError
from pagemill.base.model_spec import VocabSpec
from pagemill.text.pretokenizers import PRE_TOKENIZERS
from pagemill.text.stream import IncrementalDetokenizer
from pagemill.text.tokenizer import MAX_JSON_BYTES, Tokenizer, build_tokenizer
from tests.fixtures.byte_tokenizer import byte_alphabet, tokenizer_json
from tests.text.vocabularies import MERGES, WORDS, byte_level, sentencepiece, without

build = cache(build_tokenizer)
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t1aA'é字😀")), max_size=60)


def pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(token) for token in tokenizer.encode(text, add_special=False)]


# ---- byte-level BPE


def test_merges_apply_in_their_order_inside_pieces() -> None:
    assert pieces(build(byte_level()), "hello world  123") == [b"hello", b" wor", b"l", b"d", b" ", b" ", b"123"]


def test_ids_are_positions_in_the_vocabulary() -> None:
    assert build(byte_level()).encode("hell", add_special=False) == [256 + MERGES.index("he ll")]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("default", ["It", "'", "s", " ", " über", " ", "123", "4", "!?", "\n", "\n", "iPhone"]),
        ("gpt-2", ["It", "'s", " ", " über", " 1234", "!?", "\n", "\n", "iPhone"]),
        ("smollm", ["It", "'s", " ", " über", " ", "1", "2", "3", "4", "!?", "\n", "\n", "iPhone"]),
        ("falcon", ["It", "'", "s", " ", " über", " ", "123", "4", "!?", "\n", "\n", "iPhone"]),
        ("llama-bpe", ["It", "'s", " ", " über", " ", "123", "4", "!?\n\n", "iPhone"]),
        ("qwen2", ["It", "'s", " ", " über", " ", "1", "2", "3", "4", "!?\n\n", "iPhone"]),
        ("gpt-4o", ["It's", " ", " über", " ", "123", "4", "!?\n\n", "i", "Phone"]),
        ("tekken", ["It", "'s", " ", " über", " ", "1", "2", "3", "4", "!?\n\n", "i", "Phone"]),
        ("deepseek-v3", ["It", "'s", " ", " über", " ", "123", "4", "!?\n\n", "iPhone"]),
    ],
)
def test_pre_tokenisers_cut_as_the_models_own(pre: str, expected: list[str]) -> None:
    text = "It's  über 1234!?\n\niPhone"
    cutter = build(byte_level(pre))._library.pre_tokenizer
    assert [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)] == expected


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokeniser_keeps_every_byte(pre: str) -> None:
    text = "Straße 12345\n\n\tWE'LL don't 日本語 ½ 👩‍👧 ¡x! e\u0301  \r\n_ "
    assert b"".join(pieces(build(byte_level(pre)), text)) == text.encode()


def test_whole_pieces_win_over_merges_where_the_family_says_so() -> None:
    vocab = byte_level(merges=("a b",))
    vocab = replace(vocab, tokens=(*vocab.tokens, "xyz"), token_types=(*vocab.token_types, 1))
    assert pieces(build(replace(vocab, pre="llama-bpe")), "xyz") == [b"xyz"]
    assert pieces(build(replace(vocab, pre="qwen2")), "xyz") == [b"x", b"y", b"z"]


@given(TEXT)
def test_any_text_comes_back_byte_for_byte(text: str) -> None:
    tokenizer = build(byte_level("smollm"))
    for parse in (True, False):
        ids = tokenizer.encode(text, parse_special=parse)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(TEXT)
def test_a_stream_of_ids_gives_the_same_text(text: str) -> None:
    for vocab in (byte_level("gpt-2"), sentencepiece()):
        tokenizer = build(vocab)
        stream = IncrementalDetokenizer(tokenizer.decode)
        ids = tokenizer.encode(text)
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, len(byte_level().tokens) - 1), max_size=40))
def test_any_ids_stream_as_they_decode(ids: list[int]) -> None:
    tokenizer = build(byte_level())
    stream = IncrementalDetokenizer(tokenizer.decode)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_bytes_that_the_vocabulary_cannot_spell_are_left_out_and_named() -> None:
    tokenizer = build_tokenizer(without(byte_level(), byte_alphabet()[4]))
    assert tokenizer.unknown_bytes == {4}
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


# ---- special tokens


def test_control_tokens_are_parsed_only_when_asked() -> None:
    tokenizer = build(byte_level())
    eos = tokenizer.encode("a<|eos|>b", add_special=False)
    assert eos == [ord("a"), byte_level().eos_id, ord("b")]
    assert tokenizer.encode("<|eos|>", parse_special=False) == list(b"<|eos|>")


def test_user_defined_tokens_are_always_parsed_and_never_hidden() -> None:
    tokenizer = build(byte_level())
    tool = byte_level().tokens.index("<tool>")
    assert tokenizer.encode("a<tool>", parse_special=False) == [ord("a"), tool]
    assert tokenizer.decode([tool]) == "<tool>"
    assert tool not in tokenizer.special_ids


def test_decode_leaves_control_tokens_out_unless_asked() -> None:
    tokenizer = build(byte_level())
    ids = tokenizer.encode("<|bos|>a<|eos|>")
    assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special=False)) == ("a", "<|bos|>a<|eos|>")


def test_a_bos_is_added_once_and_only_with_add_special() -> None:
    vocab = replace(byte_level(), add_bos=True)
    tokenizer = build_tokenizer(vocab)
    assert tokenizer.encode("a") == [vocab.bos_id, ord("a")]
    assert tokenizer.encode("<|bos|>a") == [vocab.bos_id, ord("a")]
    assert tokenizer.encode("a", add_special=False) == [ord("a")]
    assert tokenizer.encode("") == [vocab.bos_id]


def test_stop_ids_are_the_named_ones_and_eos() -> None:
    tokenizer = build_tokenizer(replace(byte_level(), stop_ids=(3, 5)))
    assert tokenizer.stop_ids == {3, 5, byte_level().eos_id}


# ---- ids and texts out of the ordinary


def test_invalid_utf8_decodes_with_replacement_characters() -> None:
    assert build(byte_level()).decode([0xF0, 0x9F, ord("a"), 0xFF]) == "\ufffda\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    tokenizer = build(byte_level())
    assert tokenizer.decode([ord("a"), tokenizer.vocab_size, 2**40]) == "a"


def test_a_negative_id_is_refused() -> None:
    with pytest.raises(RequestError, match="token id -1 is negative"):
        build(byte_level()).decode([-1])


@pytest.mark.parametrize(
    ("text", "says"), [("a\ud800", "surrogate pair at character 1"), (None, "is NoneType"), (b"a", "is bytes")]
)
def test_what_is_no_text_is_refused(text: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        build(byte_level()).encode(text)


# ---- SentencePiece


def test_sentencepiece_merges_the_best_score_first() -> None:
    tokenizer = build(sentencepiece())
    assert pieces(tokenizer, "hello world") == [b" h", b"e", b"ll", b"o", b" world"]
    assert tokenizer.encode("h") == [1, 259 + WORDS.index("▁h")]


def test_unknown_characters_become_bytes() -> None:
    tokenizer = build(sentencepiece())
    assert pieces(tokenizer, "é字") == [b" ", "é".encode(), *(bytes([b]) for b in "字".encode())]
    assert tokenizer.decode(tokenizer.encode("é字")) == "é字"


@given(TEXT.filter(lambda text: "▁" not in text and "[INST]" not in text), st.booleans())
def test_any_sentencepiece_text_comes_back(text: str, prefix: bool) -> None:
    tokenizer = build(sentencepiece(add_space_prefix=prefix))
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_only_the_space_that_encoding_added_is_dropped() -> None:
    tokenizer = build(sentencepiece())
    assert tokenizer.decode(tokenizer.encode("  hello")) == "  hello"
    assert tokenizer.token_bytes(259 + WORDS.index("▁hello")) == b" hello"
    assert build(sentencepiece(add_space_prefix=False)).decode([259 + WORDS.index("▁hello")]) == " hello"


def test_text_never_merges_into_control_tokens() -> None:
    vocab = sentencepiece()
    vocab = replace(
        vocab,
        tokens=(*vocab.tokens, "<", "/", "s", ">", "</", "s>"),
        token_types=(*vocab.token_types, *(1,) * 6),
        scores=(*vocab.scores, *(0.0,) * 6),
    )
    assert 2 not in build(vocab).encode("</s>", parse_special=False)
    assert 2 in build(vocab).encode("</s>")


# ---- vocabularies that contradict themselves


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda v: replace(v, tokens=()), "no vocabulary"),
        (lambda v: replace(v, model="bert"), "'bert' is not supported; supported: gpt2, llama"),
        (lambda v: replace(v, pre="nobody"), r"'nobody' is not supported; supported: chatglm-bpe, .*smollm"),
        (lambda v: replace(v, tokens=("a", *v.tokens[1:])), r"'a' is in the vocabulary twice \(ids 0 and 97\)"),
        (lambda v: replace(v, tokens=("", *v.tokens[1:])), "token 0 of the vocabulary is empty"),
        (lambda v: replace(v, tokens=("\ud800", *v.tokens[1:])), "not Unicode"),
        (lambda v: replace(v, token_types=(1, 1)), "269 tokens but 2 token types"),
        (lambda v: replace(v, scores=(1.0,)), "269 tokens but 1 scores"),
        (lambda v: replace(v, token_types=(*v.token_types[1:], 9)), "token type 9 is unknown"),
        (lambda v: replace(v, bos_id=269), "BOS token id is 269, but the vocabulary has 269 tokens"),
        (lambda v: replace(v, eos_id=-1), "EOS token id is -1"),
        (lambda v: replace(v, stop_ids=(1, 999)), "stop token id is 999"),
        (lambda v: replace(v, add_bos=True, bos_id=None), "names none"),
    ],
)
def test_damaged_byte_level_vocabularies_are_refused(damage: Callable[[VocabSpec], VocabSpec], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build_tokenizer(damage(byte_level()))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda v: replace(v, merges=()), "without merges"),
        (lambda v: replace(v, merges=("ab",)), "merge 0 is 'ab'; it must be two tokens"),
        (lambda v: replace(v, merges=("h e", "a b c")), "merge 1 is 'a b c'; it must be two tokens"),
        (lambda v: replace(v, merges=("q q",)), "'qq' is not in the vocabulary"),
        (lambda v: replace(v, merges=("hex e",)), "'hex' is not in the vocabulary"),
        (lambda v: replace(v, merges=("h e", "h e")), "listed twice"),
        (lambda v: replace(v, merges=("he", "l l l")), "merge 0 is 'he'; it must be two tokens"),
        (lambda v: replace(v, merges=("h e", " l")), "merge 1 is ' l'; it must be two tokens"),
        (lambda v: replace(v, tokens=(*v.tokens, "a\nb"), token_types=(), merges=("a \nb",)), r"'\\nb' is not in"),
        (
            lambda v: replace(v, tokens=(*v.tokens, "\n", "\nh"), token_types=(), merges=("\n h", "\n e")),
            r"merge 1 is '\\n e', but '\\ne' is not in",
        ),
    ],
)
def test_damaged_merges_are_refused_before_a_text_is_encoded(
    damage: Callable[[VocabSpec], VocabSpec], says: str
) -> None:
    tokenizer = build_tokenizer(damage(byte_level()))
    assert tokenizer.decode([104, 105]) == "hi"  # ids and their texts need no merges
    for _ in range(2):
        with pytest.raises(ModelError, match=says):
            tokenizer.encode("hi")
    with pytest.raises(ModelError, match=says):
        tokenizer.prepare()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda v: replace(v, scores=()), "without scores"),
        (lambda v: replace(v, scores=v.scores[1:]), "281 scores"),
        (lambda v: replace(without(v, "<0x41>"), unk_id=None), r"<0x41> is missing"),
        (lambda v: replace(v, unk_id=10**6), "unknown token id is 1000000"),
    ],
)
def test_damaged_sentencepiece_vocabularies_are_refused(damage: Callable[[VocabSpec], VocabSpec], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build_tokenizer(damage(sentencepiece()))


def test_merges_need_not_be_in_the_order_of_the_vocabulary() -> None:
    vocab = byte_level()
    turned = replace(vocab, tokens=(*vocab.tokens[:256], *vocab.tokens[-4:-14:-1], *vocab.tokens[-3:]))
    assert turned.tokens != vocab.tokens
    ours, theirs = build_tokenizer(vocab), build_tokenizer(turned)
    assert theirs.decode(theirs.encode("hello world 123")) == "hello world 123"
    assert [turned.tokens[i] for i in theirs.encode("hello  123")] == [
        vocab.tokens[i] for i in ours.encode("hello  123")
    ]


@pytest.mark.parametrize("vocab", [byte_level(), sentencepiece()])
def test_nothing_that_encodes_is_made_until_there_is_a_text_or_it_is_asked_for(vocab: VocabSpec) -> None:
    tokenizer = build_tokenizer(vocab)
    assert "h" in tokenizer.decode(range(tokenizer.vocab_size))
    assert tokenizer._made is None
    asked = build_tokenizer(vocab)
    asked.prepare()
    made = asked._made
    assert made is not None
    assert asked.encode("hello") == tokenizer.encode("hello")
    assert asked._made is made


def test_threads_that_encode_their_first_text_at_once_share_what_is_made() -> None:
    made = []
    tokenizer = build_tokenizer(byte_level())
    make = tokenizer._make_library

    def make_slowly() -> Any:
        made.append(None)
        time.sleep(0.05)  # every thread has come for it by then
        return make()

    tokenizer._make_library = make_slowly
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(tokenizer.encode, ["hello world"] * 32))
    assert found == [build_tokenizer(byte_level()).encode("hello world")] * 32
    assert len(made) == 1


def test_a_vocabulary_of_bytes_alone_needs_no_merges() -> None:
    vocab = VocabSpec(tokens=tuple(byte_alphabet()), model="gpt2")
    assert build_tokenizer(vocab).encode("hé") == list("hé".encode())


# ---- tokenizer.json


def changed(change: Callable[[dict[str, Any]], None]) -> str:
    document = json.loads(tokenizer_json(300))
    change(document)
    return json.dumps(document)


def test_a_tokenizer_json_is_used_as_it_is() -> None:
    tokenizer = build_tokenizer(VocabSpec(tokenizer_json=tokenizer_json(300), bos_id=297, eos_id=298))
    ids = tokenizer.encode("abc é<|im_end|>")
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(ids, skip_special=False) == "abc é<|im_end|>"
    assert tokenizer.special_ids == {297, 298, 299}
    assert ids[-1] == 299
    assert tokenizer.encode("<|im_end|>", parse_special=False) != [299]


def test_a_tokenizer_json_may_not_cut_or_pad() -> None:
    def cut(document: dict[str, Any]) -> None:
        document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}

    assert len(build_tokenizer(VocabSpec(tokenizer_json=changed(cut))).encode("x y z")) > 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}, "hello"),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, " hello"),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "hello",
        ),
    ],
)
def test_sentencepiece_decoders_of_a_tokenizer_json_are_known(kind: dict[str, Any], expected: str) -> None:
    def spell(document: dict[str, Any]) -> None:
        document["decoder"], document["pre_tokenizer"], document["added_tokens"] = kind, None, []
        document["model"] |= {"vocab": {"▁hello": 0, "<0x41>": 1}, "merges": []}

    tokenizer = build_tokenizer(VocabSpec(tokenizer_json=changed(spell)))
    assert tokenizer.decode([0]) == tokenizer._library.decode([0]) == expected
    assert tokenizer.token_bytes(1) == b"A"


def repeated_id(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["zzz"] = 5


def moved_special(document: dict[str, Any]) -> None:
    document["added_tokens"][0]["id"] = 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a": "\ud800"}', "not JSON"),
        ("[]", 'no "model"'),
        ('{"model": 3}', 'no "model"'),
        ("[" * 100_000, "not JSON"),
        ('{"model": {"type": "BPE", "vocab": {}}}', "holds no vocabulary"),
        (changed(lambda d: d["model"].update(type="Unigram")), "'Unigram' model; supported: BPE"),
        (changed(lambda d: d["model"].update(merges=[["a", "nope"]])), "cannot be used"),
        (changed(lambda d: d["model"]["vocab"].update(zzz=-1)), "the id -1"),
        (changed(lambda d: d["model"]["vocab"].update(zzz=2**31)), "the id 2147483648"),
        (changed(lambda d: d["model"]["vocab"].update(zzz="5")), "the id '5'"),
        (changed(repeated_id), "disagrees with itself"),
        (changed(moved_special), "disagrees with itself"),
        (changed(lambda d: d.update(decoder=None)), "decodes with nothing"),
        (changed(lambda d: d.update(decoder={"type": "WordPiece"})), "decodes with WordPiece; supported: ByteLevel"),
        (changed(lambda d: d.update(pre_tokenizer={"type": "Nonsense"})), "cannot be used"),
        (" " * (MAX_JSON_BYTES + 1), "up to 67,108,864"),
    ],
)
def test_hostile_tokenizer_json_is_refused(text: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build_tokenizer(VocabSpec(tokenizer_json=text))


def test_a_tokenizer_json_that_disagrees_with_the_vocabulary_is_refused() -> None:
    with pytest.raises(ModelError, match=r"300 token ids, but the model's vocabulary has 269"):
        build_tokenizer(replace(byte_level(), tokenizer_json=tokenizer_json(300)))


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.dictionaries(
                st.sampled_from(["model", "vocab", "type", "merges", "decoder", "added_tokens", "content", "id", "a"]),
                inner,
                max_size=4,
            )
            | st.lists(inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_tokeniser_or_a_named_error(document: object) -> None:
    try:
        tokenizer = build_tokenizer(VocabSpec(tokenizer_json=json.dumps(document)))
    except ModelError:
        return
    assert tokenizer.vocab_size > 0
