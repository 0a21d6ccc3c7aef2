from __future__ import annotations

import pytest

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError
from pagemill.base.kv_spec import KVSpec, LayerKV
from pagemill.planner.memory import blocks_that_fit, window_pages

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


WINDOWED = KVSpec((LayerKV(2, 64), LayerKV(2, 64, "window", 100), LayerKV(2, 64, "window", 100)), codec="bf16")


def config_of(memory_bytes: int | None, **options: object) -> EngineConfig:
    """Chunks of 60: a sequence holds (100 + 60 + 13) // 16 + 1 = 11 pages of a window of 100."""
    return EngineConfig(kv_cache_memory_bytes=memory_bytes, max_num_batched_tokens=60, **options)  # type: ignore[arg-type]


def test_memory_is_shared_out_between_blocks_and_pages_of_windows() -> None:
    """62 blocks of one layer and 22 pages of two layers are a sequence; each cache has one page more, for copies."""
    config = config_of(10 * (62 * BLOCK + 22 * 2 * BLOCK) + 2 * 2 * BLOCK)
    num_blocks = blocks_that_fit(config, WINDOWED, 992, weight_bytes=0, free_bytes=GIB)
    assert num_blocks == 620
    assert window_pages(config, WINDOWED, 992, num_blocks) == (221,)
    assert config.kv_cache_memory_bytes is not None
    assert config.kv_cache_memory_bytes >= 620 * BLOCK + 221 * 2 * BLOCK


def test_short_sequences_have_a_page_for_each_block() -> None:
    config = config_of(GIB // 16)
    num_blocks = blocks_that_fit(config, WINDOWED, 160, weight_bytes=0, free_bytes=GIB)
    assert window_pages(config, WINDOWED, 160, num_blocks) == (num_blocks + 1,)


def test_layers_that_all_read_a_window_leave_blocks_that_cost_nothing() -> None:
    spec = KVSpec((LayerKV(2, 64, "window", 100),) * 2, codec="bf16")
    config = config_of(22 * 2 * BLOCK + 2 * 2 * BLOCK)
    assert blocks_that_fit(config, spec, 992, weight_bytes=0, free_bytes=GIB) == 62
    assert window_pages(config, spec, 992, 62) == (23,)


@pytest.mark.parametrize(
    ("max_model_len", "options"),
    [
        (100, {}),
        (992, {"enable_prefix_caching": "off"}),
        (992, {"kv_cache": "contiguous"}),
        (992, {"kv_cache": "none"}),
    ],
)
def test_windows_have_no_pages_of_their_own_where_nothing_lets_go_of_them(
    max_model_len: int, options: dict[str, str]
) -> None:
    config = config_of(GIB // 16, **options)
    num_blocks = blocks_that_fit(config, WINDOWED, max_model_len, weight_bytes=0, free_bytes=GIB)
    assert num_blocks == GIB // 16 // WINDOWED.block_bytes
    assert window_pages(config, WINDOWED, max_model_len, num_blocks) == ()


def test_memory_below_one_sequence_is_refused_with_its_pages() -> None:
    with pytest.raises(
        CapacityError, match=rf"62 blocks × {BLOCK:,} bytes \+ 23 pages of a window × {2 * BLOCK:,} bytes"
    ):
        blocks_that_fit(config_of(100 * BLOCK), WINDOWED, 992, weight_bytes=0, free_bytes=GIB)
