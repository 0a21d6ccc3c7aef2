"""How the memory of a machine is shared out: weights, KV blocks, pages of layers that read a window. Arithmetic only,
with messages that show it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagemill.base.config import EngineConfig
from pagemill.base.errors import CapacityError
from pagemill.base.kv_spec import KVSpec, pages_in_reach
from pagemill.base.units import format_bytes

DEFAULT_SHARE = 4  # the KV cache takes at the most free memory ÷ 4 unless told otherwise
# Of a window group, as many pages for each sequence that blocks are there for: its own, and as many kept for hits.
_SEQUENCES_OF_PAGES = 2


@dataclass(frozen=True, slots=True)
class _Layout:
    """What sequences of max_model_len take. block_bytes: of the first KV group. windows: by window group, pages for
    each sequence and bytes of a page; empty where a block holds all layers."""

    per_sequence: int
    block_bytes: int
    windows: tuple[tuple[int, int], ...]

    @property
    def sequence_bytes(self) -> int:
        return self.per_sequence * self.block_bytes + sum(count * size for count, size in self.windows)

    @property
    def smallest_bytes(self) -> int:
        """Memory of a cache of one sequence."""
        return self.cache_bytes(self.per_sequence)

    def pages(self, num_blocks: int) -> tuple[int, ...]:
        """Pages of each window group beside so many blocks, one of them for copies."""
        return tuple(-(-num_blocks * count // self.per_sequence) + 1 for count, _ in self.windows)

    def cache_bytes(self, num_blocks: int) -> int:
        pages = zip(self.pages(num_blocks), self.windows, strict=True)
        return num_blocks * self.block_bytes + sum(count * size for count, (_, size) in pages)

    def blocks_in(self, memory_bytes: int) -> int:
        """The most blocks that fit, with their pages."""
        rounded_up = 2 * sum(size for _, size in self.windows)
        return max(0, memory_bytes - rounded_up) * self.per_sequence // self.sequence_bytes

    def show(self, num_blocks: int) -> str:
        """The arithmetic of so many blocks."""
        parts = [f"{num_blocks:,} blocks × {self.block_bytes:,} bytes"]
        pages = zip(self.pages(num_blocks), self.windows, strict=True)
        parts += [f"{count:,} pages of a window × {size:,} bytes" for count, (_, size) in pages]
        return f"{' + '.join(parts)} = {format_bytes(self.cache_bytes(num_blocks))}"


def _layout(config: EngineConfig, kv_spec: KVSpec, max_model_len: int) -> _Layout:
    per_sequence = kv_spec.num_blocks(max_model_len)
    shares = config.kv_cache == "paged" and config.enable_prefix_caching == "on"
    if not shares or not any(window < max_model_len for window in kv_spec.windows):
        return _Layout(per_sequence, kv_spec.block_bytes, ())
    full, *windows = replace(kv_spec, window_pages=(1,) * len(kv_spec.windows)).groups
    reach = [pages_in_reach(each, config.max_num_batched_tokens, kv_spec.block_size) for each in kv_spec.windows]
    counts = [min(per_sequence, _SEQUENCES_OF_PAGES * each) for each in reach]
    sizes = [group.spec.block_bytes for group in windows]
    return _Layout(per_sequence, full.spec.block_bytes, tuple(zip(counts, sizes, strict=True)))


def window_pages(config: EngineConfig, kv_spec: KVSpec, max_model_len: int, num_blocks: int) -> tuple[int, ...]:
    """How many pages each window group has beside so many blocks (`KVSpec.window_pages`).

    Empty where layers keep all positions, window or not: those of models whose windows reach over max_model_len, and
    all without a prefix cache.
    """
    return _layout(config, kv_spec, max_model_len).pages(num_blocks)


def blocks_that_fit(
    config: EngineConfig, kv_spec: KVSpec, max_model_len: int, weight_bytes: int, free_bytes: int
) -> int:
    """How many KV blocks to make, with the pages of `window_pages` beside them.

    As many as kv_cache_memory_bytes holds; unset, what max_num_seqs sequences of max_model_len need, at the most a
    quarter of the free memory. Raises CapacityError, with the arithmetic, where not even one sequence of max_model_len
    fits, or where weights and cache exceed the free memory.
    """
    layout = _layout(config, kv_spec, max_model_len)
    per_sequence = layout.per_sequence
    asked = config.kv_cache_memory_bytes
    if asked is not None:
        num_blocks = layout.blocks_in(asked)
        room = f"kv_cache_memory_bytes is {format_bytes(asked)}"
    else:
        share = max(0, free_bytes - weight_bytes) // DEFAULT_SHARE
        num_blocks = min(config.max_num_seqs * per_sequence, layout.blocks_in(share))
        room = (
            f"a quarter of the free memory ({format_bytes(free_bytes)} less {format_bytes(weight_bytes)} of weights) "
            f"is {format_bytes(share)}"
        )
    one = f"one sequence of max_model_len ({max_model_len:,} tokens) needs {layout.show(per_sequence)} of KV cache"
    if num_blocks < per_sequence:
        fits = num_blocks * kv_spec.block_size
        lower = f"lower max_model_len to {fits:,}" if fits else "lower max_model_len"
        raise CapacityError(f"not enough memory: {one}, and {room}; raise kv_cache_memory_bytes or {lower}")
    if weight_bytes + layout.cache_bytes(num_blocks) > free_bytes:
        raise CapacityError(
            f"not enough memory: {format_bytes(weight_bytes)} of weights + {layout.show(num_blocks)} of KV cache "
            f"exceed the {format_bytes(free_bytes)} that are free; lower kv_cache_memory_bytes or max_model_len "
            f"(smallest KV cache: {format_bytes(layout.smallest_bytes)})"
        )
    return num_blocks
