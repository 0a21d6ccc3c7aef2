"""What a word looks like where it is told: as text, in hexadecimal, in base64, and as token ids of a model's own
tokeniser, whatever stands between them. Owns the search in bytes; knows no server."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers

# What stands before the word where it is encoded: nothing, spaces, quotes, control tokens, the end of another word.
BEFORE: Final = ("", " ", "  ", "\n", '"', "'", "(", "[", ":", "-", "<|im_start|>user\n", "<|im_end|>\n", "prompt", "s")
_MOST: Final = 3  # of one look in one place
# Between ids: commas, spaces, line ends, names of types and attributes, never a digit of another number.
_BETWEEN: Final = rb"(?:int(?:8|16|32|64)|[^0-9]){1,24}"
_APART: Final = rb"[^0-9A-Za-z]{0,8}"  # between letters that are told one by one, or in pieces
_TAGS: Final = rb"(?:\x0a.\x18)"  # protobuf: an element of a list, a whole number


class Needles:
    """The looks of one word. tokenizer: `tokenizer.json` of the model."""

    def __init__(self, word: str, tokenizer: Path) -> None:
        self.ids = word_ids(word, tokenizers.Tokenizer.from_file(str(tokenizer)))
        looks = {"text": _APART.join(each.encode() for each in word), **_coded("text", [word.encode()])}
        looks["ids"] = _any_of(_as_numbers(each) for each in self.ids)
        looks["ids in protobuf"] = _any_of(map(_in_protobuf, self.ids))
        for dtype in ("<u2", "<i4", "<i8"):
            data = [np.asarray(each, dtype).tobytes() for each in self.ids]
            looks[f"ids of {dtype}"] = _any_of(map(re.escape, data))
            looks |= _coded(f"ids of {dtype}", data)
        self._looks = {
            name: re.compile(look, re.DOTALL | (re.IGNORECASE if "text" in name or "hexa" in name else 0))
            for name, look in looks.items()
        }

    def found_in(self, told: Mapping[str, bytes]) -> list[str]:
        """Where the word is, and how it looks there, some of each kind."""
        return [
            f"{place}, as {name}: {text[max(0, match.start() - 60) : match.end() + 60]!r:.300}"
            for place, text in told.items()
            for name, look in self._looks.items()
            for match in islice(look.finditer(text), _MOST)
        ]


def word_ids(word: str, tokenizer: tokenizers.Tokenizer) -> list[tuple[int, ...]]:
    """Token ids that lie wholly within a word, each sequence once: in each context, and its bytes, which a client can
    send as ids."""
    found = {tuple(word.encode()): None}
    for before in BEFORE:
        coded = tokenizer.encode(f"{before}{word}-", add_special_tokens=False)
        begin, end = len(before), len(before) + len(word)
        inside = [i for i, (a, b) in enumerate(coded.offsets) if begin <= a < b <= end]
        found[tuple(coded.ids[i] for i in inside)] = None
    assert all(len(each) > 2 for each in found), f"{word!r} is too short to be told by its ids: {list(found)}"
    return list(found)


def _as_numbers(ids: Sequence[int]) -> bytes:
    return rb"(?<![0-9])" + _BETWEEN.join(str(each).encode() for each in ids) + rb"(?![0-9])"


def _in_protobuf(ids: Sequence[int]) -> bytes:
    """Numbers of a list, each with its tags, or packed; packed bytes are the text."""
    between = _TAGS if max(ids) < 128 else _TAGS + b"?"
    return between.join(re.escape(_varint(token)) for token in ids)


def _any_of(looks: Iterable[bytes]) -> bytes:
    return b"|".join(b"(?:" + each + b")" for each in looks)


def _coded(name: str, data: Sequence[bytes]) -> dict[str, bytes]:
    """Hexadecimal, with anything or nothing between the bytes, and base64 wherever in its text the data begins."""
    hexa = [rb"(?:\\x|0x|[^0-9a-z]){0,4}".join(b"%02x" % byte for byte in each) for each in data]
    looks = {f"{name} in hexadecimal": _any_of(hexa)}
    for shift in range(3):
        texts = []
        for each in data:
            whole = len(each) - (len(each) + shift) % 3  # bytes that no later byte shares a letter with
            coded = base64.b64encode(b"x" * shift + each[:whole])[(0, 2, 3)[shift] :]
            texts.append(re.escape(coded).replace(rb"\+", rb"[+-]").replace(b"/", b"[/_]"))
        looks[f"{name} in base64 at {shift}"] = _any_of(texts)
    return looks


def _varint(number: int) -> bytes:
    """A whole number as protobuf writes it."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
