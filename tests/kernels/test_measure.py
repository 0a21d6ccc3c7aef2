from __future__ import annotations

import numpy as np
import pytest

from pagemill.kernels import _native
from pagemill.kernels.native import allocate
from pagemill.kernels.target import available_targets

F32, BF16, INT8, TILE_BF16, TILE_INT8 = range(5)


@pytest.mark.parametrize("target", available_targets())
@pytest.mark.parametrize("threads", [1, 2])
def test_every_target_multiplies_in_the_three_vector_forms(target: str, threads: int) -> None:
    for arithmetic in (F32, BF16, INT8):
        assert _native.multiply_add_rate(target, arithmetic, threads, 2) > 1e6


@pytest.mark.parametrize("target", available_targets())
def test_only_amx_has_tiles(target: str) -> None:
    assert (_native.multiply_add_rate(target, TILE_BF16, 1, 2) > 0) == (target == "amx")
    assert target == "amx" or _native.multiply_add_rate(target, TILE_INT8, 1, 2) == 0


@pytest.mark.parametrize("target", available_targets())
def test_memory_is_read_by_one_thread_and_by_several(target: str) -> None:
    memory = allocate(1 << 20, "a test")
    memory[:] = 1
    assert _native.read_rate(target, memory, 1, 2) > 1e6
    assert _native.read_rate(target, memory, 3, 2) > 1e6


@pytest.mark.parametrize("target", available_targets())
@pytest.mark.parametrize(("piece", "stride"), [(512, 512), (2048, 6336), (4096, 1 << 17)])
def test_memory_is_read_in_pieces(target: str, piece: int, stride: int) -> None:
    memory = allocate(1 << 20, "a test")
    memory[:] = 1
    assert _native.piece_rate(target, memory, piece, stride, 1, 2) > 1e6
    assert _native.piece_rate(target, memory, piece, stride, 3, 2) > 1e6


@pytest.mark.parametrize(
    ("piece", "stride", "threads", "says"),
    [(0, 512, 1, "multiple of 512"), (500, 512, 1, "multiple of 512"), (1024, 512, 1, "shorter than a piece"),
     (512, 1000, 1, "multiple of 64"), (512, 8192, 1, "too little memory"), (512, 2048, 3, "too little memory"),
     (512, 512, 0, "out of range")],
)  # fmt: skip
def test_pieces_that_cannot_be_read_are_refused(piece: int, stride: int, threads: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _native.piece_rate("scalar", allocate(4096, "a test"), piece, stride, threads, 1)


@pytest.mark.parametrize(
    ("target", "arithmetic", "threads", "samples"),
    [("quantum", 0, 1, 1), ("scalar", 5, 1, 1), ("scalar", -1, 1, 1), ("scalar", 0, 0, 1), ("scalar", 0, 257, 1),
     ("scalar", 0, 1, 0)],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(target: str, arithmetic: int, threads: int, samples: int) -> None:
    with pytest.raises(ValueError, match=r"not available|out of range|unknown arithmetic"):
        _native.multiply_add_rate(target, arithmetic, threads, samples)


def test_memory_too_small_for_its_threads_or_badly_placed_is_refused() -> None:
    memory = allocate(4096, "a test")
    with pytest.raises(ValueError, match="too little memory"):
        _native.read_rate("scalar", memory, 9, 1)
    with pytest.raises(ValueError, match="not 64-byte aligned"):
        _native.read_rate("scalar", memory[1:], 1, 1)
    with pytest.raises(TypeError):
        _native.read_rate("scalar", memory.astype(np.float32), 1, 1)  # type: ignore[arg-type]
