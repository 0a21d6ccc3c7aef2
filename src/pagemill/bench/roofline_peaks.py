"""What this machine can do at most: bytes read and numbers multiplied per second, and the price of a barrier.

Owns the list of arithmetics and the choice of buffer sizes; the loops are native (csrc/generic/measure-inl.h), each
target's own vector type on the kernels' own threads. Others disturb, nobody helps: the best of many samples counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pagemill.bench.machine import barrier_ns
from pagemill.kernels import _native
from pagemill.kernels.native import allocate
from pagemill.planner.machine import last_level_cache_bytes, this_machine

# In the order of csrc/measure.h's enum Arithmetic: what it is called in tables.
ARITHMETICS: dict[str, str] = {
    "f32": "f32 multiply-add",
    "bf16": "bf16 dot product",
    "int8": "int8 dot product",
    "tile_bf16": "bf16 on AMX tiles",
    "tile_int8": "int8 on AMX tiles",
}
MEMORY, NEAR, PAGES = "memory", "weights", "pages"

_NAMES = tuple(ARITHMETICS)
_DEFAULT_CACHE_BYTES = 64 << 20
_SMALLEST_BYTES = 16 << 20
_ALIGNMENT = 1 << 16
_PIECE_BYTES = 512  # that native code reads at once


@dataclass(slots=True)
class Peaks:
    """The best seen so far. Mutated by `measure`. Keys are (name, threads).

    multiply_adds: by arithmetic, per second, 0.0 where the target has none. read_bytes: by buffer (MEMORY, NEAR), or in
    pieces (PAGES), per second. barrier_ns: by threads, the least.
    """

    multiply_adds: dict[tuple[str, int], float] = field(default_factory=dict)
    read_bytes: dict[tuple[str, int], float] = field(default_factory=dict)
    barrier_ns: dict[int, float] = field(default_factory=dict)


def memory_buffer_bytes() -> int:
    """A size far beyond the last-level cache: four times it, at the most a quarter of the free memory."""
    wanted = 4 * (last_level_cache_bytes() or _DEFAULT_CACHE_BYTES)
    return max(_SMALLEST_BYTES, min(wanted, this_machine().free_bytes // 4) // _ALIGNMENT * _ALIGNMENT)


class PeakMeter:
    """Measures peaks again and again, so that they can be interleaved with what is compared with them.

    Mutated by `measure`. target: of the kernels. buffers: name -> bytes of each buffer that is read; numbers of
    threads: each is measured. Raises CapacityError where a buffer cannot be had.
    """

    def __init__(self, target: str, buffers: dict[str, int], threads: tuple[int, ...]) -> None:
        self.peaks = Peaks()
        self.buffer_bytes = {name: max(_ALIGNMENT, size // _ALIGNMENT * _ALIGNMENT) for name, size in buffers.items()}
        self._target = target
        self._threads = tuple(dict.fromkeys(threads))
        memory = allocate(max(self.buffer_bytes.values(), default=_ALIGNMENT), "measuring memory bandwidth")
        memory[:] = np.uint8(0x5A)  # pages that were never written are one and the same
        self._memory: NDArray[np.uint8] = memory

    def measure_reading(self, samples: int, names: tuple[str, ...] | None = None) -> None:
        """Read every buffer (or those named), and keep the best rates."""
        for name in self.buffer_bytes if names is None else names:
            data = self._memory[: self.buffer_bytes[name]]
            for threads in self._threads:
                rate = _native.read_rate(self._target, data, threads, samples)
                key = (name, threads)
                self.peaks.read_bytes[key] = max(rate, self.peaks.read_bytes.get(key, 0.0))

    def measure_pages(self, samples: int, page_bytes: int, block_bytes: int) -> None:
        """Read the largest buffer as attention reads a KV cache of such blocks: of each block a page, then of each the
        next one. Keeps the best rate. A page counts in whole 512 bytes."""
        for threads in self._threads:
            most = self._memory.nbytes // threads // _PIECE_BYTES * _PIECE_BYTES
            piece = min(most, max(_PIECE_BYTES, page_bytes // _PIECE_BYTES * _PIECE_BYTES))
            stride = min(most, max(piece, block_bytes))
            rate = _native.piece_rate(self._target, self._memory, piece, stride, threads, samples)
            key = (PAGES, threads)
            self.peaks.read_bytes[key] = max(rate, self.peaks.read_bytes.get(key, 0.0))

    def measure_arithmetic(self, samples: int) -> None:
        """Multiply in every form that the target has, and wait at barriers; keep the best rates."""
        for threads in self._threads:
            for index, name in enumerate(_NAMES):
                rate = _native.multiply_add_rate(self._target, index, threads, samples)
                key = (name, threads)
                self.peaks.multiply_adds[key] = max(rate, self.peaks.multiply_adds.get(key, 0.0))
            if threads > 1:
                least = self.peaks.barrier_ns.get(threads)
                now = barrier_ns(threads)
                self.peaks.barrier_ns[threads] = now if least is None else min(now, least)


def rate_of(peaks: Peaks, arithmetic: str, threads: int) -> float:
    """Multiply-adds per second of an arithmetic that the target has and that was measured."""
    rate = peaks.multiply_adds.get((arithmetic, threads), 0.0)
    assert rate > 0, (arithmetic, threads)
    return rate
