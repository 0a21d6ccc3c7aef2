"""Token ids to text while they arrive, with no character ever cut. Owns the window of ids that is decoded again at each
push; knows no vocabulary (the decoder is handed in) and no stop strings. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"

# A UTF-8 character has at most 4 bytes and every visible token at least one: 4 tokens before the newest are enough to
# know where in a character the newest begins. Twice that is kept.
_KEPT_IDS = 8
_WINDOW_IDS = 2 * _KEPT_IDS


class Pieces(dict[int, tuple[str, str] | None]):
    """What each token adds to a text in its middle, for one decoder; shared by all its streams. Mutated by look-ups,
    which remember, so that a token of whole characters is decoded once and not at each push.

    By token id: its text after whole characters, and at the beginning of a text, where a space may be dropped. None
    where bytes around the token could make other characters of its own.
    """

    __slots__ = ("_decode",)

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def __missing__(self, token_id: int) -> tuple[str, str] | None:
        twice = self._decode((token_id, token_id))
        first = twice[: len(twice) // 2]
        if twice != first + first:  # a space was dropped
            first = self._decode((token_id,))
        whole = REPLACEMENT not in twice and twice.startswith(first)
        self[token_id] = known = (twice[len(first) :], first) if whole else None
        return known


class IncrementalDetokenizer:
    """Text of one sequence, piece by piece. Mutated by `push` and `flush`.

    decode: ids -> text, where ids stand for bytes that are joined and read as UTF-8 with U+FFFD for invalid bytes; it
    may leave ids out (special tokens) and may drop a space at the very beginning (SentencePiece). pieces: of the same
    decoder, where streams share them.

        ids     … dropped | kept kept kept new |
        decode              <--- window ------>
        text              | already given |delta| U+FFFD that may yet become a character |

    All deltas joined, with `flush` at the end, equal `decode` of all ids. A push decodes 17 ids at the most, and none
    where the text ends with a whole character and the new token consists of such.
    """

    __slots__ = ("_decode", "_given", "_last", "_pieces", "_text", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str], pieces: Pieces | None = None) -> None:
        self._decode = decode
        self._pieces = Pieces(decode) if pieces is None else pieces
        self._last: int | None = None  # the newest id with text, where it consists of whole characters: then the window
        self._window: list[int] = []
        self._text = ""
        self._given = 0

    def push(self, token_id: int) -> str:
        """Add one id. Returns the text that became final, often one word, empty while a character is incomplete.

        A U+FFFD at the end is held back until the next id, since only that tells an invalid byte from a character
        that is still arriving.
        """
        if self._last is None and (not self._given or self._given != len(self._text)):
            return self._push_bytes(token_id)
        known = self._pieces[token_id]
        if known is None:
            return self._push_bytes(token_id)
        piece = known[0]
        if piece:
            self._last = token_id
        return piece

    def _push_bytes(self, token_id: int) -> str:
        if self._last is not None:
            known = self._pieces[self._last]
            assert known is not None
            self._window, self._text = [self._last], known[1]
            self._given = len(self._text)
            self._last = None
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._text and not self._decode((token_id, token_id)):
            self._window.pop()
            return ""
        self._text = text
        delta = self._take(_final_length(text))
        if len(self._window) > _WINDOW_IDS:
            self._window = self._window[-_KEPT_IDS:]
            self._text = self._decode(self._window)
            self._given = _final_length(self._text)
        return delta

    def flush(self) -> str:
        """The end of the sequence: text still held back, where an incomplete character is now U+FFFD."""
        return self._take(len(self._text))

    def _take(self, end: int) -> str:
        delta = self._text[self._given : end]
        self._given = max(self._given, end)
        return delta


def _final_length(text: str) -> int:
    """Characters of a decoded text that later bytes cannot change: all but a U+FFFD at the end."""
    return len(text) - text.endswith(REPLACEMENT)
