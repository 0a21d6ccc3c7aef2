"""Token ids to text while they arrive, with no character ever cut. Owns the window of ids that is decoded again at each
push; knows no vocabulary (the decoder is handed in) and no stop strings. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"

# A UTF-8 character has at most 4 bytes and every visible token at least one: 4 tokens before the newest are enough to
# know where in a character the newest begins. Twice that is kept.
_KEPT_IDS = 8
_WINDOW_IDS = 2 * _KEPT_IDS


class IncrementalDetokenizer:
    """Text of one sequence, piece by piece. Mutated by `push` and `flush`.

    decode: ids -> text, where ids stand for bytes that are joined and read as UTF-8 with U+FFFD for invalid bytes; it
    may leave ids out (special tokens) and may drop a space at the very beginning (SentencePiece).

        ids     … dropped | kept kept kept new |
        decode              <--- window ------>
        text              | already given |delta| U+FFFD that may yet become a character |

    All deltas joined, with `flush` at the end, equal `decode` of all ids. A push decodes 17 ids at the most.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""
        self._given = 0

    def push(self, token_id: int) -> str:
        """Add one id. Returns the text that became final, often one word, empty while a character is incomplete.

        A U+FFFD at the end is held back until the next id, since only that tells an invalid byte from a character
        that is still arriving.
        """
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
