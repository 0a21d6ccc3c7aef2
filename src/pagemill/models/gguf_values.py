"""Metadata values of a GGUF file, read from hostile bytes. Owns the bounds of counts, lengths and types; knows nothing
of tensors and of what a key means.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import ModelError

MetadataValue = bool | int | float | str | list[str] | NDArray[Any]

MAX_TEXT_BYTES: Final = 64 << 20
MAX_STRINGS: Final = 1 << 21
DAMAGED: Final = "The file is damaged, cut short or not made by a GGUF writer: fetch it again, or convert it again"

_BOOL, _STRING, _ARRAY = 7, 8, 9
# GGUF value type -> (struct format, numpy dtype); both little endian
_NUMBERS: Final[dict[int, tuple[struct.Struct, str]]] = {
    0: (struct.Struct("<B"), "<u1"),
    1: (struct.Struct("<b"), "<i1"),
    2: (struct.Struct("<H"), "<u2"),
    3: (struct.Struct("<h"), "<i2"),
    4: (struct.Struct("<I"), "<u4"),
    5: (struct.Struct("<i"), "<i4"),
    6: (struct.Struct("<f"), "<f4"),
    10: (struct.Struct("<Q"), "<u8"),
    11: (struct.Struct("<q"), "<i8"),
    12: (struct.Struct("<d"), "<f8"),
}
# Strings are looked for so many at once, in a window of so many bytes for each, their lengths included.
_STRINGS_AT_ONCE: Final = 2048
_USUAL_STRING_BYTES: Final = 32
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


@dataclass(slots=True)
class GGUFCursor:
    """Mutated by every read: `position` moves forward through `buffer`. No read passes the end of the buffer.

    All methods raise ModelError, naming `path` and the field (`what`), when the bytes are not what they claim to be.
    """

    path: Path
    buffer: mmap
    position: int = 0
    num_strings: int = 0
    num_text_bytes: int = 0

    @property
    def num_left(self) -> int:
        """Bytes between here and the end of the file."""
        return len(self.buffer) - self.position

    def refuse(self, what: str, problem: str, mend: str = DAMAGED) -> NoReturn:
        """Raise ModelError for the field `what`."""
        raise ModelError(f"{self.path}: {what}: {problem}. {mend}.")

    def _take(self, num_bytes: int, what: str) -> int:
        start = self.position
        if num_bytes > self.num_left:
            self.refuse(
                what, f"needs {num_bytes:,} bytes at offset {start:,}, but only {self.num_left:,} are left in the file"
            )
        self.position = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        """An unsigned 32-bit number."""
        return int(_U32.unpack_from(self.buffer, self._take(4, what))[0])

    def u64(self, what: str) -> int:
        """An unsigned 64-bit number."""
        return int(_U64.unpack_from(self.buffer, self._take(8, what))[0])

    def string(self, what: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """A UTF-8 string with its length before it, of `max_bytes` at the most."""
        num_bytes = self.u64(f"{what}, length")
        if num_bytes > max_bytes:
            self.refuse(what, f"is {num_bytes:,} bytes long; at most {max_bytes:,} are accepted")
        start = self._take(num_bytes, what)
        self.num_text_bytes += num_bytes
        if self.num_text_bytes > MAX_TEXT_BYTES:
            self.refuse(what, f"brings the text of the file above {MAX_TEXT_BYTES:,} bytes")
        try:
            return str(memoryview(self.buffer)[start : start + num_bytes], "utf-8")
        except UnicodeDecodeError as error:
            # `from None`: the codec's error would keep a view of the map alive.
            self.refuse(what, f"is not UTF-8 (byte {error.start})")

    def value(self, what: str) -> MetadataValue:
        """A value with its type before it: number, truth value, string, or an array of one of these.

        Arrays of numbers are read-only views into the file, [count] of the file's dtype.
        """
        kind = self.u32(f"{what}, type")
        if kind == _ARRAY:
            return self._array(what)
        if kind == _STRING:
            return self.string(what)
        if kind == _BOOL:
            byte = self.buffer[self._take(1, what)]
            if byte > 1:
                self.refuse(what, f"is {byte} where a truth value is 0 or 1")
            return byte == 1
        if kind not in _NUMBERS:
            self.refuse(what, f"has the unknown value type {kind}")
        number: int | float = _NUMBERS[kind][0].unpack_from(self.buffer, self._take(_NUMBERS[kind][0].size, what))[0]
        return number

    def _array(self, what: str) -> MetadataValue:
        kind = self.u32(f"{what}, element type")
        count = self.u64(f"{what}, count")
        if kind == _STRING:
            return self._strings(count, what)
        if kind == _ARRAY:
            self.refuse(what, "is an array of arrays, which no supported model has")
        if kind != _BOOL and kind not in _NUMBERS:
            self.refuse(what, f"is an array of the unknown value type {kind}")
        dtype = np.dtype(np.uint8 if kind == _BOOL else _NUMBERS[kind][1])
        start = self._take(count * dtype.itemsize, what)
        numbers = np.frombuffer(self.buffer, dtype, count, start) if count else np.empty(0, dtype)
        if kind != _BOOL:
            return numbers
        if count and int(numbers.max()) > 1:
            self.refuse(what, "holds bytes other than 0 and 1 where truth values are meant")
        return numbers.view(np.bool_)

    def _strings(self, count: int, what: str) -> list[str]:
        self.num_strings += count
        if count * _U64.size > self.num_left:
            self.refuse(what, f"claims {count:,} strings, more than the {self.num_left:,} bytes left can hold")
        if self.num_strings > MAX_STRINGS:
            self.refuse(what, f"brings the strings of the file to {self.num_strings:,}; {MAX_STRINGS:,} are accepted")
        first, spare = self.position, MAX_TEXT_BYTES - self.num_text_bytes
        end = min(len(self.buffer), first + count * _U64.size + spare)
        strings: list[str] = []
        while len(strings) < count:
            num_wanted = min(count - len(strings), _STRINGS_AT_ONCE)
            found = _short_strings(self.buffer, num_wanted, self.position, end)
            if found is None:
                self._read_strings(num_wanted, end, strings, what)
            else:
                strings += found[0]
                self.position += found[1]
        self.num_text_bytes += self.position - first - count * _U64.size
        return strings

    def _read_strings(self, count: int, end: int, strings: list[str], what: str) -> None:
        """Append strings of any length one by one, none of which may pass the offset `end`."""
        buffer, position = self.buffer, self.position
        length_at = _U64.unpack_from
        try:
            for _ in range(count):
                start = position + 8
                if start <= end:
                    position = start + length_at(buffer, position)[0]
                if start > end or position > end:
                    self.refuse(
                        f"{what}[{len(strings)}]", f"ends outside the file or the {MAX_TEXT_BYTES:,} bytes accepted"
                    )
                strings.append(buffer[start:position].decode())
        except UnicodeDecodeError:
            self.refuse(f"{what}[{len(strings)}]", "is not UTF-8")
        self.position = position


def _short_strings(buffer: mmap, count: int, first: int, end: int) -> tuple[list[str], int] | None:
    """`count` strings that begin at an offset, read at once, and the bytes that they take. end: none may pass it.

    Only where each has 1 to 255 bytes and none begins or ends with a zero: a length is then one byte and seven zeros,
    and seven zeros stand nowhere else. None where that does not hold to the end, or for what is not UTF-8.
    """
    window = min(end - first, count * _USUAL_STRING_BYTES)
    if window < count * (_U64.size + 1):
        return None
    data = np.frombuffer(buffer, np.uint8, window, first).copy()
    zero = data == 0
    pairs = zero[:-1] & zero[1:]
    fours = pairs[:-2] & pairs[2:]
    lengths_at = np.flatnonzero(fours[:-3] & fours[3:])[:count] - 1  # seven zeros begin one byte behind each length
    if len(lengths_at) < count or lengths_at[0] != 0:
        return None
    ends = lengths_at + _U64.size + data[lengths_at]
    num_bytes = int(ends[-1])
    if num_bytes > window or not np.array_equal(ends[:-1], lengths_at[1:]) or not data[ends - 1].all():
        return None
    data[lengths_at] = 0
    try:
        text = data[:num_bytes].tobytes().decode()
    except UnicodeDecodeError:
        return None
    return text.split("\0" * _U64.size)[1:], num_bytes
