"""Encoding a text that begins like the one before it. Owns where a text may be cut and the ids of the pieces.

A conversation is rendered anew for each turn, and most of it was encoded a turn ago. A text is therefore cut, from its
beginning on, into pieces whose ids do not depend on what follows; a piece that the last text had as well is not encoded
again. Standard library only.
"""

from __future__ import annotations

import re
from typing import Protocol

from pagemill.base.errors import RequestError

PIECE_CHARACTERS = 512

# Between a lower-case letter and the space before another one, where byte-level pre-tokenisers always cut.
WORD_END = re.compile("[a-z](?= [a-z])")


class Encoder(Protocol):
    """What is asked of a tokeniser. cuts_at_words: wherever `WORD_END` cuts a text, its ids are those of the parts."""

    cuts_at_words: bool

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]: ...


class RememberingEncoder:
    """A tokeniser that remembers the pieces of the last text. Mutated by `encode`; for one thread and one caller, to
    whom alone the time that it takes may tell what was encoded before. Memory is bounded by the last text."""

    __slots__ = ("_encoder", "_pieces")

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._pieces: dict[str, list[int]] = {}

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """As the tokeniser does, to the id. Raises what it raises."""
        encoder = self._encoder
        if add_special or not parse_special or not encoder.cuts_at_words:
            return encoder.encode(text, add_special=add_special, parse_special=parse_special)
        try:
            return self._encode_pieces(text)
        except RequestError:  # says where in a piece; the tokeniser says where in the text
            return encoder.encode(text, add_special=False)

    def _encode_pieces(self, text: str) -> list[int]:
        token_ids: list[int] = []
        pieces: dict[str, list[int]] = {}
        at = 0
        while (cut := WORD_END.search(text, at + PIECE_CHARACTERS)) is not None:
            piece = text[at : cut.end()]
            ids = self._pieces.get(piece)
            if ids is None:
                ids = self._encoder.encode(piece, add_special=False)
            pieces[piece] = ids
            token_ids += ids
            at = cut.end()
        self._pieces = pieces
        return token_ids + self._encoder.encode(text[at:], add_special=False)

    def copy(self) -> RememberingEncoder:
        """Another one that remembers the same."""
        other = RememberingEncoder(self._encoder)
        other._pieces = dict(self._pieces)
        return other

    def forget(self) -> None:
        """Remember nothing."""
        self._pieces = {}
