"""How the memory of a machine is shared out: weights, KV blocks. Arithmetic only, with messages that show it."""

from __future__ import annotations

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError
from pagemill.base.kv_spec import KVSpec
from pagemill.base.units import format_bytes

DEFAULT_SHARE = 4  # the KV cache takes at the most free memory ÷ 4 unless told otherwise


def blocks_that_fit(
    config: EngineConfig, kv_spec: KVSpec, max_model_len: int, weight_bytes: int, free_bytes: int
) -> int:
    """How many KV blocks to make.

    As many as kv_cache_memory_bytes holds; unset, what max_num_seqs sequences of max_model_len need, at the most a
    quarter of the free memory. Raises CapacityError, with the arithmetic, where not even one sequence of max_model_len
    fits, or where weights and cache exceed the free memory.
    """
    per_sequence = kv_spec.num_blocks(max_model_len)
    asked = config.kv_cache_memory_bytes
    if asked is not None:
        num_blocks = asked // kv_spec.block_bytes
        room = f"kv_cache_memory_bytes is {format_bytes(asked)}"
    else:
        share = max(0, free_bytes - weight_bytes) // DEFAULT_SHARE
        num_blocks = min(config.max_num_seqs * per_sequence, share // kv_spec.block_bytes)
        room = (
            f"a quarter of the free memory ({format_bytes(free_bytes)} less {format_bytes(weight_bytes)} of weights) "
            f"is {format_bytes(share)}"
        )
    one = (
        f"one sequence of max_model_len ({max_model_len:,} tokens) needs {per_sequence:,} blocks × "
        f"{kv_spec.block_bytes:,} bytes = {format_bytes(per_sequence * kv_spec.block_bytes)} of KV cache"
    )
    if num_blocks < per_sequence:
        fits = num_blocks * kv_spec.block_size
        lower = f"lower max_model_len to {fits:,}" if fits else "lower max_model_len"
        raise CapacityError(f"not enough memory: {one}, and {room}; raise kv_cache_memory_bytes or {lower}")
    cache_bytes = num_blocks * kv_spec.block_bytes
    if weight_bytes + cache_bytes > free_bytes:
        raise CapacityError(
            f"not enough memory: {format_bytes(weight_bytes)} of weights + {num_blocks:,} blocks × "
            f"{kv_spec.block_bytes:,} bytes = {format_bytes(cache_bytes)} of KV cache exceed the "
            f"{format_bytes(free_bytes)} that are free; lower kv_cache_memory_bytes or max_model_len "
            f"(smallest KV cache: {format_bytes(per_sequence * kv_spec.block_bytes)})"
        )
    return num_blocks
