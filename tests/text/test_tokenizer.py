"""Tokenisers from vocabulary lists and from tokenizer.json: ids, bytes, round trips, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.base.errors import ModelError, RequestError
from pagemill.base.model_spec import VocabSpec
from pagemill.models.checkpoint import open_checkpoint
from pagemill.text.pretokenizers import PRE_TOKENIZERS
from pagemill.text.stream import IncrementalDetokenizer
from pagemill.text.tokenizer import MAX_JSON_BYTES, Tokenizer, build_tokenizer
from tests.fixtures.byte_tokenizer import byte_alphabet, tokenizer_json
from tests.fixtures.default_model import default_model_path
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
        (lambda v: replace(v, merges=()), "without merges"),
        (lambda v: replace(v, merges=("ab",)), "merge 0 is 'ab'; it must be two tokens"),
        (lambda v: replace(v, merges=("h e", "a b c")), "merge 1 is 'a b c'; it must be two tokens"),
        (lambda v: replace(v, merges=("q q",)), "'qq' is not in the vocabulary"),
        (lambda v: replace(v, merges=("hex e",)), "'hex' is not in the vocabulary"),
        (lambda v: replace(v, merges=("h e", "h e")), "listed twice"),
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
        (lambda v: replace(v, scores=()), "without scores"),
        (lambda v: replace(v, scores=v.scores[1:]), "279 scores"),
        (lambda v: replace(without(v, "<0x41>"), unk_id=None), r"<0x41> is missing"),
        (lambda v: replace(v, unk_id=10**6), "unknown token id is 1000000"),
    ],
)
def test_damaged_sentencepiece_vocabularies_are_refused(damage: Callable[[VocabSpec], VocabSpec], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build_tokenizer(damage(sentencepiece()))


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


# ---- the default model. Ids: llama.cpp's tokeniser on the same file (vocab_only).


@cache
def default_tokenizer() -> Tokenizer:
    return build_tokenizer(open_checkpoint(default_model_path()).vocab)


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world", [19556, 905]),
        ("  leading", [216, 2899]),
        ("trailing  ", [4861, 4966, 256]),
        ("a\n\nb\r\n\tc", [81, 198, 198, 82, 2738, 197, 83]),
        (
            "1234567890 12 3.14e-10",
            [33, 34, 35, 36, 37, 38, 39, 40, 41, 32, 216, 33, 34, 216, 35, 30, 33, 36, 85, 29, 33, 32],
        ),
        ("I'm you're WE'LL don't 'S 'Ll", [57, 5248, 346, 2316, 26587, 23, 16421, 1326, 982, 637, 67, 637, 60, 92]),
        ("émigré naïve", [2756, 22757, 27968, 15486, 46494]),
        (
            "日本語テキスト、漢字かな",
            [
                23274,
                115,
                40993,
                179,
                120,
                248,
                11100,
                224,
                10391,
                251,
                10391,
                134,
                11100,
                226,
                29917,
                177,
                137,
                112,
                36518,
                7365,
                229,
                7365,
                120,
            ],
        ),
        (
            "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 flags \U0001f1e9\U0001f1ea",
            [
                10813,
                242,
                218,
                10813,
                235,
                119,
                321,
                231,
                10813,
                235,
                119,
                321,
                231,
                10813,
                235,
                117,
                13198,
                15107,
                225,
                119,
                10813,
                225,
                120,
            ],
        ),
        ("مرحبا بالعالم", [21706, 20602, 44626, 31462, 10805, 45726, 22208, 34966, 22208, 21706]),
        (
            "Ωmega ½ ² ④ Ⅷ ٣٤",
            [
                153,
                119,
                93,
                9005,
                216,
                16738,
                216,
                19133,
                216,
                173,
                235,
                113,
                216,
                173,
                223,
                117,
                216,
                164,
                113,
                164,
                114,
            ],
        ),
        (
            "x=y+z; // c++\n\tfor(int i=0;i<n;i++){}",
            [
                104,
                45,
                105,
                27,
                106,
                43,
                13241,
                265,
                11444,
                198,
                197,
                1710,
                24,
                591,
                2056,
                45,
                32,
                43,
                89,
                44,
                94,
                43,
                89,
                11444,
                25,
                6150,
            ],
        ),
        ("\xa0nbsp\u2003em\u3000ideo", [15442, 94, 32093, 321, 221, 391, 12109, 218, 8496]),
        ("zero\u200bwidth\ufeffbom", [13723, 321, 229, 6930, 186, 136, 140, 82, 300]),
        ("ＦＵＬＬ１２３", [8083, 116, 8083, 130, 8083, 122, 8083, 122, 8083, 235, 8083, 236, 8083, 237]),
        ("𝔘𝔫𝔦 𐍈", [23159, 238, 242, 23159, 238, 121, 23159, 238, 116, 216, 187, 234, 231, 226]),
        ("\x00\x01\x04\x7f", [190, 191, 217]),
        ("    \n    \n  x", [289, 2367, 3805, 1792]),
        ("HelloWorldFooBAR", [19556, 11265, 54, 568, 50, 2285]),
        ("a", [81]),
        ("[INST] hi [/INST]<|user|>x", [75, 39637, 77, 15876, 933, 31, 39637, 15971, 108, 4093, 108, 46, 104]),
        ("½1²", [16738, 33, 19133]),
    ],
)
def test_the_default_model_gives_the_ids_of_its_own_tokeniser(text: str, expected: list[int]) -> None:
    assert default_tokenizer().encode(text) == expected


@pytest.mark.model
def test_the_default_models_control_tokens() -> None:
    tokenizer = default_tokenizer()
    assert tokenizer.vocab_size == 49152
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.stop_ids >= {2}
    assert tokenizer.encode("a<|endoftext|>b", parse_special=False) == [81, 44, 108, 486, 1714, 2692, 108, 46, 82]


@pytest.mark.model
@given(TEXT)
def test_the_default_model_returns_any_text_that_it_can_spell(text: str) -> None:
    tokenizer = default_tokenizer()
    spelled = bytes(byte for byte in text.encode() if byte not in tokenizer.unknown_bytes)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == spelled.decode(errors="replace")


@pytest.mark.model
def test_the_default_models_stream_is_its_text() -> None:
    tokenizer = default_tokenizer()
    text = "👩‍👩‍👧 naïve 日本語\n\n" * 40
    stream = IncrementalDetokenizer(tokenizer.decode)
    assert "".join([*map(stream.push, tokenizer.encode(text)), stream.flush()]) == text
