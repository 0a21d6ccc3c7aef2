"""JSON read from hostile bytes in place, for readers that know the shape they expect. Owns grammar and bounds: no
recursion on the input, memory only for the strings that the caller asks for, duplicate keys refused. Builds no trees.

Grammar: RFC 8259, with no numbers but whole ones where a number is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Final, NoReturn

from pagemill.base.errors import ModelError

MAX_STRING_BYTES: Final = 4096
MAX_TEXT_BYTES: Final = 16 << 20
MAX_DEPTH: Final = 16
MAX_MEMBERS: Final = 1 << 17
MAX_SKIPPED: Final = 1 << 17

_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_STRING: Final = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"')
_WHOLE: Final = re.compile(rb"0|[1-9][0-9]{0,18}(?![0-9.eE])")
_ATOM: Final = re.compile(rb"true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?")


@dataclass(slots=True)
class JsonScanner:
    """Mutated by every read: `position` moves through `buffer` up to `end`. `where` is named in every error.

    All methods raise ModelError when the text is not what they expect.
    """

    buffer: bytes | mmap
    where: str
    position: int
    end: int
    num_text_bytes: int = 0
    num_skipped: int = 0

    def refuse(self, problem: str) -> NoReturn:
        """Raise ModelError with the place of the problem."""
        raise ModelError(f"{self.where}: {problem}, at byte {self.position:,}. The file is damaged: fetch it again.")

    def string(self) -> str:
        """A string of MAX_STRING_BYTES at the most."""
        start, self.position = self._match_string()
        if self.position - start > MAX_STRING_BYTES:
            self.refuse(f"a name of {self.position - start:,} bytes (at most {MAX_STRING_BYTES:,} are accepted)")
        self.num_text_bytes += self.position - start
        if self.num_text_bytes > MAX_TEXT_BYTES:
            self.refuse(f"names of more than {MAX_TEXT_BYTES:,} bytes in all")
        try:
            text: str = json.loads(self.buffer[start : self.position])
            text.encode()
        except ValueError:
            self.refuse("a string is not valid")
        return text

    def whole_numbers(self, max_count: int) -> list[int]:
        """An array of at most `max_count` whole numbers ≥ 0, below 10^19."""
        numbers: list[int] = []
        self._expect(b"[")
        if self._accept(b"]"):
            return numbers
        while True:
            found = _WHOLE.match(self.buffer, self._skip_space(), self.end)
            if found is None:
                self.refuse("expected a whole number")
            numbers.append(int(found.group()))
            if len(numbers) > max_count:
                self.refuse(f"an array of more than {max_count} numbers")
            self.position = found.end()
            if self._accept(b"]"):
                return numbers
            self._expect(b",")

    def members(self) -> Iterator[str]:
        """The keys of an object, one by one; the caller reads each value before it takes the next key."""
        seen: set[str] = set()
        self._expect(b"{")
        if self._accept(b"}"):
            return
        while True:
            self._skip_space()
            key = self.string()
            if key in seen:
                self.refuse(f"the key {key[:80]!r} appears twice")
            if len(seen) >= MAX_MEMBERS:
                self.refuse(f"an object of more than {MAX_MEMBERS:,} members")
            seen.add(key)
            self._expect(b":")
            self._skip_space()
            yield key
            if self._accept(b"}"):
                return
            self._expect(b",")

    def skip_value(self, depth: int = 0) -> None:
        """Pass over any value nested at most MAX_DEPTH deep; only its grammar is checked. MAX_SKIPPED values
        in all are passed over."""
        if depth > MAX_DEPTH:
            self.refuse(f"nested more than {MAX_DEPTH} deep")
        self.num_skipped += 1
        if self.num_skipped > MAX_SKIPPED:
            self.refuse(f"more than {MAX_SKIPPED:,} values that no reader asked for")
        self._skip_space()
        first = self.buffer[self.position : min(self.position + 1, self.end)]
        if first == b'"':
            self.position = self._match_string()[1]
        elif first == b"{":
            self._expect(b"{")
            self._skip_items(b"}", depth)
        elif first == b"[":
            self._expect(b"[")
            self._skip_items(b"]", depth)
        else:
            found = _ATOM.match(self.buffer, self.position, self.end)
            if found is None:
                self.refuse("expected a value")
            self.position = found.end()

    def finish(self) -> None:
        """Check that nothing but white space follows."""
        if self._skip_space() != self.end:
            self.refuse("text after the end of the JSON value")

    def _skip_items(self, closing: bytes, depth: int) -> None:
        if self._accept(closing):
            return
        while True:
            if closing == b"}":
                self._skip_space()
                self.position = self._match_string()[1]
                self._expect(b":")
            self.skip_value(depth + 1)
            if self._accept(closing):
                return
            self._expect(b",")

    def _skip_space(self) -> int:
        found = _SPACE.match(self.buffer, self.position, self.end)
        assert found is not None, "the pattern matches the empty text"
        self.position = found.end()
        return self.position

    def _accept(self, mark: bytes) -> bool:
        start = self._skip_space()
        if start >= self.end or self.buffer[start : start + 1] != mark:
            return False
        self.position = start + 1
        return True

    def _expect(self, mark: bytes) -> None:
        if not self._accept(mark):
            self.refuse(f"expected {mark.decode()!r}")

    def _match_string(self) -> tuple[int, int]:
        found = _STRING.match(self.buffer, self._skip_space(), self.end)
        if found is None:
            self.refuse("expected a string")
        return found.span()
