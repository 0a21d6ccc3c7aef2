"""Small vocabularies that tests build tokenisers from. Owns no checks."""

from __future__ import annotations

from dataclasses import replace

from pagemill.base.model_spec import VocabSpec
from tests.fixtures.byte_tokenizer import byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u0120"  # a space in the byte-level alphabet
MERGES = ("h e", "l l", "he ll", "hell o", f"{SPACE} w", "o r", f"{SPACE}w or", "1 2", "12 3", f"{SPACE} {SPACE}")


def byte_level(pre: str = "gpt-2", merges: tuple[str, ...] = MERGES) -> VocabSpec:
    """All 256 bytes (byte b is id b), what the merges make (from 256), bos and eos (control), <tool> (user defined)."""
    tokens = (*byte_alphabet(), *(merge.replace(" ", "") for merge in merges), "<|bos|>", "<|eos|>", "<tool>")
    size = len(tokens)
    types = (NORMAL,) * (size - 3) + (CONTROL, CONTROL, USER_DEFINED)
    return VocabSpec(
        tokens=tokens, merges=merges, token_types=types, model="gpt2", pre=pre, bos_id=size - 3, eos_id=size - 2
    )


WORDS = (
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "▁h",
    "he",
    "ll",
    "hell",
    "▁hell",
    "hello",
    "▁hello",
    "or",
    "▁w",
    "▁wor",
    "ld",
    "▁world",
    "▁▁",
    "é",
)


def sentencepiece(*, add_space_prefix: bool = True) -> VocabSpec:
    """<unk> <s> </s>, 256 byte tokens from id 3, WORDS from id 259 with falling scores, then [INST] (user defined)."""
    tokens = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, "[INST]")
    types = (UNKNOWN, CONTROL, CONTROL) + (BYTE,) * 256 + (NORMAL,) * len(WORDS) + (USER_DEFINED,)
    scores = (0.0,) * 259 + tuple(-float(i) for i in range(len(WORDS))) + (0.0,)
    return VocabSpec(
        tokens=tokens,
        scores=scores,
        token_types=types,
        model="llama",
        bos_id=1,
        eos_id=2,
        unk_id=0,
        add_bos=True,
        add_space_prefix=add_space_prefix,
    )


def without(vocab: VocabSpec, token: str) -> VocabSpec:
    """The vocabulary without one token; ids above it move down."""
    index = vocab.tokens.index(token)
    return replace(
        vocab,
        tokens=vocab.tokens[:index] + vocab.tokens[index + 1 :],
        token_types=vocab.token_types[:index] + vocab.token_types[index + 1 :],
        scores=vocab.scores[:index] + vocab.scores[index + 1 :],
        bos_id=None,
        eos_id=None,
        add_bos=False,
    )
