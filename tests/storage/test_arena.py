"""The arena: geometry, zeroed memory, and memory that is not to be had."""

from __future__ import annotations

import numpy as np
import pytest

from pagemill.base.errors import CapacityError
from pagemill.base.kv_spec import KVSpec, LayerKV
from pagemill.storage.arena import Arena


def spec(codec: str = "bf16") -> KVSpec:
    return KVSpec((LayerKV(2, 40), LayerKV(1, 64)), 32, codec)


@pytest.mark.parametrize("num_blocks", [1, 500])
def test_blocks_are_zeroed_aligned_and_apart(num_blocks: int) -> None:
    arena = Arena.allocate(spec(), num_blocks)
    assert arena.data.ctypes.data % 64 == 0
    assert not arena.data.any()
    arena.block(num_blocks - 1)[:] = 7
    assert np.count_nonzero(arena.data) == spec().block_bytes
    assert arena.block(num_blocks - 1).shape == (spec().block_bytes,)


def test_memory_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(CapacityError, match=r"KV cache of .* blocks.*lower kv_cache_memory_bytes"):
        Arena.allocate(spec(), 2**46)


@pytest.mark.parametrize(("codec", "bits"), [("f32", 32.0), ("bf16", 16.0), ("f16", 16.0), ("int8", 8.25)])
def test_bits_per_value_count_scales(codec: str, bits: float) -> None:
    assert KVSpec((LayerKV(3, 64),), 16, codec).bits_per_value == bits
    assert KVSpec((LayerKV(3, 40),), 16, codec).bits_per_value > bits  # padding counts
