"""A search through the whole writable memory of this process, that leaves no copy of what it looks for.

Needles are kept masked (every byte with MASK laid over it by xor). Memory is read through /proc/self/mem into one
mapping and masked into another, and these two are left out of the search: nothing that is found was put there by it.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK = 0xA5
CHUNK_BYTES = 1 << 24
NEEDLE_BYTES = 16
LINE_BYTES = 64  # rows of activations begin at multiples of it
_MASK_OF_EXPONENT = 0xA5A5A5A5 >> 23 & 255
Bytes = NDArray[np.uint8]


def masked(data: Bytes) -> Bytes:
    """A masked copy; what it is of is not copied unmasked on the way."""
    return np.bitwise_xor(data, np.uint8(MASK))


@dataclass(frozen=True, slots=True)
class Region:
    """Addresses from start to end of a mapping; name: its file, or [heap], or nothing."""

    start: int
    end: int
    name: str


def writable_regions() -> list[Region]:
    """Private mappings that can be read and written. A thread's stack is what lies behind a page of its own that
    nobody may touch, as far as a stack goes."""
    found = []
    guard_end, most = 0, resource.getrlimit(resource.RLIMIT_STACK)[0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, _, _, _, *name = line.split(maxsplit=5)
            start, end = (int(each, 16) for each in span.split("-"))
            if access.startswith("rw") and not (name and name[0].startswith(("[vvar", "[vsyscall"))):
                if not name and start == guard_end:
                    stack_end = min(end, start + most) if most > 0 else end
                    found.append(Region(start, stack_end, "[stack of a thread]"))
                    start = stack_end
                if start < end:
                    found.append(Region(start, end, name[0].strip() if name else ""))
            is_guard = access.startswith("---") and not name and end - start == mmap.PAGESIZE
            guard_end = end if is_guard else 0
    return found


class Scanner:
    """Looks for masked needles of 16 bytes at addresses that are multiples of 4. Mutated by `scan` (its buffers)."""

    def __init__(self) -> None:
        self._maps = [mmap.mmap(-1, CHUNK_BYTES + NEEDLE_BYTES) for _ in range(2)]
        self._read, self._masked = (np.frombuffer(each, np.uint8) for each in self._maps)
        self._own = [array.__array_interface__["data"][0] for array in (self._read, self._masked)]
        self.num_bytes = 0

    def scan(self, needles: set[bytes]) -> dict[int, tuple[bytes, str]]:
        """Where needles stand: address -> the needle (masked) and the name of the mapping."""
        firsts = np.unique(np.frombuffer(b"".join(each[:4] for each in needles), np.uint32))
        likely = np.zeros(1 << 16, bool)
        likely[firsts >> 16] = True
        self.num_bytes = 0
        found: dict[int, tuple[bytes, str]] = {}
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for region in writable_regions():
                for start, size in self._pieces(region):
                    self._search(memory.fileno(), start, size, needles, firsts, likely, region.name, found)
        return found

    def copies(self) -> list[tuple[int, Bytes]]:
        """All that is searched, as addresses and masked copies."""
        found = []
        for start, data in self._contents():
            found.append((start, data.copy()))
        return found

    def lines_since(self, before: list[tuple[int, Bytes]], skip: Sequence[NDArray[Any]]) -> list[bytes]:
        """The first bytes (masked) of each line of memory that holds sixteen 32-bit floats of common sizes, none of
        which stood there `before` (from `copies`). The arrays of `skip` are left out."""
        found: list[bytes] = []
        spans = [(each.__array_interface__["data"][0], each.nbytes) for each in skip]
        for start, data in self._contents():
            old = np.full(len(data), MASK, np.uint8)
            for at, known in before:
                first, end = max(at, start), min(at + len(known), start + len(data))
                if first < end:
                    old[first - start : end - start] = known[first - at : end - at]
            words = data.view(np.uint32)
            exponents = (words >> 23 & 255) ^ _MASK_OF_EXPONENT
            floats = (exponents > 107) & (exponents < 137) & (words != old.view(np.uint32))
            lines = np.flatnonzero(floats.reshape(-1, LINE_BYTES // 4).all(axis=1)) * LINE_BYTES
            for at, size in spans:
                lines = lines[(start + lines + LINE_BYTES <= at) | (start + lines >= at + size)]
            found += [data[at : at + NEEDLE_BYTES].tobytes() for at in lines.tolist()]
        return found

    def _contents(self) -> Iterator[tuple[int, Bytes]]:
        """Addresses and masked contents of whole lines, good until the next."""
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for region in writable_regions():
                for start, most in self._pieces(region):
                    size = self._take(memory.fileno(), start, min(most, CHUNK_BYTES))
                    yield start, self._masked[: size // LINE_BYTES * LINE_BYTES]

    def _pieces(self, region: Region) -> Iterator[tuple[int, int]]:
        """The region without this object's buffers, in chunks."""
        spans = [(region.start, region.end)]
        for own in self._own:
            stop = own + CHUNK_BYTES + mmap.PAGESIZE
            pieces = [piece for a, b in spans for piece in ((a, min(b, max(a, own))), (max(a, min(b, stop)), b))]
            spans = [(a, b) for a, b in pieces if a < b]
        for a, b in spans:
            for start in range(a, b, CHUNK_BYTES):
                yield start, min(CHUNK_BYTES + NEEDLE_BYTES, b - start)

    def _search(
        self,
        file: int,
        start: int,
        size: int,
        needles: set[bytes],
        firsts: NDArray[np.uint32],
        likely: NDArray[np.bool_],
        name: str,
        found: dict[int, tuple[bytes, str]],
    ) -> None:
        size = self._take(file, start, size)
        self.num_bytes += size
        size -= size % 4
        words = self._masked[:size].view(np.uint32)
        close = np.flatnonzero(likely[words >> 16])
        # A needle, which is kept masked, reads as what it was. Only what begins as a needle does becomes an object, as
        # one would stay in memory to be found.
        for index in close[np.isin(words[close], firsts)].tolist():
            at = 4 * index
            if (data := self._masked[at : at + NEEDLE_BYTES].tobytes()) in needles:
                found[start + at] = data, name

    def _take(self, file: int, start: int, size: int) -> int:
        """Read memory into the one buffer and mask it into the other. Returns the bytes that could be read."""
        try:
            size = os.preadv(file, [memoryview(self._maps[0])[:size]], start)
        except OSError:  # a guard page
            return 0
        np.bitwise_xor(self._read[:size], np.uint8(MASK), out=self._masked[:size])
        return size
