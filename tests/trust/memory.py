"""A search through the whole writable memory of this process, that leaves no copy of what it looks for.

Needles are kept masked (every byte with MASK laid over it by xor). Memory is read through /proc/self/mem into one
mapping and masked into another, and these two are left out of the search: nothing that is found was put there by it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MASK = 0xA5
CHUNK_BYTES = 1 << 24
NEEDLE_BYTES = 16
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
    """Private mappings that can be read and written."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, _, _, _, *name = line.split(maxsplit=5)
            start, end = (int(each, 16) for each in span.split("-"))
            if access.startswith("rw") and not (name and name[0].startswith(("[vvar", "[vsyscall"))):
                found.append(Region(start, end, name[0].strip() if name else ""))
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
                    self._search(memory.fileno(), start, size, needles, likely, region.name, found)
        return found

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
        likely: NDArray[np.bool_],
        name: str,
        found: dict[int, tuple[bytes, str]],
    ) -> None:
        try:
            size = os.preadv(file, [memoryview(self._maps[0])[:size]], start)
        except OSError:  # a guard page
            return
        self.num_bytes += size
        size -= size % 4
        np.bitwise_xor(self._read[:size], np.uint8(MASK), out=self._masked[:size])
        words = self._masked[:size].view(np.uint32)
        for index in np.flatnonzero(likely[words >> 16]).tolist():
            at = 4 * index
            if (data := self._masked[at : at + NEEDLE_BYTES].tobytes()) in needles:
                found[start + at] = data, name
