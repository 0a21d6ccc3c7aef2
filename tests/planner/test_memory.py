from __future__ import annotations

import pytest

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError
from pagemill.base.kv_spec import KVSpec, LayerKV
from pagemill.planner.memory import blocks_that_fit

SPEC = KVSpec((LayerKV(num_kv_heads=2, head_dim=64),), block_size=16, codec="bf16")
BLOCK = SPEC.block_bytes  # 2 heads × 16 positions × (64 + 64) × 2 bytes
GIB = 2**30


def test_a_block_is_as_large_as_the_arithmetic_says() -> None:
    assert BLOCK == 2 * 16 * 128 * 2


def test_unset_memory_is_what_the_sequences_need() -> None:
    config = EngineConfig(max_num_seqs=4)
    assert blocks_that_fit(config, SPEC, 100, weight_bytes=0, free_bytes=64 * GIB) == 4 * 7


def test_unset_memory_stays_below_a_quarter_of_what_is_free() -> None:
    config = EngineConfig(max_num_seqs=1000)
    free = 4 * 50 * BLOCK + 1000
    assert blocks_that_fit(config, SPEC, 160, weight_bytes=1000, free_bytes=free) == 50


def test_given_memory_is_used_to_the_last_whole_block() -> None:
    config = EngineConfig(kv_cache_memory_bytes=10 * BLOCK + BLOCK - 1)
    assert blocks_that_fit(config, SPEC, 160, weight_bytes=0, free_bytes=GIB) == 10


def test_memory_below_one_sequence_is_refused_with_the_arithmetic() -> None:
    config = EngineConfig(kv_cache_memory_bytes=3 * BLOCK)
    with pytest.raises(CapacityError) as caught:
        blocks_that_fit(config, SPEC, 1000, weight_bytes=0, free_bytes=GIB)
    message = str(caught.value)
    assert f"1,000 tokens) needs 63 blocks × {BLOCK:,} bytes" in message
    assert "raise kv_cache_memory_bytes or lower max_model_len to 48" in message


def test_memory_below_one_block_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"lower max_model_len$"):
        blocks_that_fit(EngineConfig(kv_cache_memory_bytes=1), SPEC, 1000, weight_bytes=0, free_bytes=GIB)


def test_weights_and_cache_beyond_free_memory_are_refused_with_the_arithmetic() -> None:
    config = EngineConfig(kv_cache_memory_bytes=GIB)
    with pytest.raises(CapacityError, match=r"512 MiB of weights \+ .* = 1 GiB of KV cache exceed the 1 GiB"):
        blocks_that_fit(config, SPEC, 1000, weight_bytes=GIB // 2, free_bytes=GIB)


def test_weights_beyond_free_memory_are_refused() -> None:
    with pytest.raises(CapacityError, match="is 0 B; raise kv_cache_memory_bytes"):
        blocks_that_fit(EngineConfig(), SPEC, 1000, weight_bytes=2 * GIB, free_bytes=GIB)
