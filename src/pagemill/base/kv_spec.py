"""The geometry of the KV cache: what one token position holds, layer by layer, and how many bytes that is.

A model's plan declares the layers; the engine adds block size and codec. Nothing here knows an array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pagemill.base.errors import ConfigError

KVKind = Literal["full", "window"]

# Resident codecs: bytes of one value, and bytes of scales beside each key or value vector.
KV_VALUE_BYTES: dict[str, int] = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}
KV_SCALE_BYTES: dict[str, int] = {"f32": 0, "f16": 0, "bf16": 0, "int8": 2}

PAGE_POSITIONS = 16  # the kernels read keys and values in pages of 16 positions
LANES = 16  # head dimensions are padded to whole vectors


def padded(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def pages_in_reach(window: int, chunk: int, block_size: int) -> int:
    """Pages of a window group that a sequence holds at a time, at most: those of a window that ends before a chunk, and
    of the chunk, wherever they begin."""
    return (window + chunk + block_size - 3) // block_size + 1


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer keeps of a token position: a key and a value of `head_dim` numbers for each KV head.

    kind "window" with `window` = w: a query at position p reads positions p-w+1 .. p only.
    """

    num_kv_heads: int
    head_dim: int
    kind: KVKind = "full"
    window: int | None = None

    def __post_init__(self) -> None:
        assert self.num_kv_heads > 0
        assert 0 < self.head_dim <= 256
        assert (self.kind == "window") == (self.window is not None)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share blocks. layers: their numbers in the model, in order. spec: of these layers alone. window:
    positions that they read, None for all. num_pages: blocks of a window group, which are its pages; 0 for the first
    group, whose number is the cache's."""

    layers: tuple[int, ...]
    spec: KVSpec
    window: int | None = None
    num_pages: int = 0


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Layers + block size (positions, a multiple of 16) + resident codec.

    Layout of a block, in order: layer, KV head, page of 16 positions, then keys `[head_dim][16]` and values
    `[16][head_dim]`, head_dim padded to 16; int8: keys u8 (value + 128) `[head_dim/4][16][4]`, values s8
    `[4][head_dim][4]`, f16 scales `[16]` of keys, then of values. Page of (layer l, head h, page j of the block)
    starts at `layer_offset(l) + (h * pages_per_block + j) * page_bytes(l)`.

    window_pages: how many pages each window group has, by `windows`; layers of one window are then a group with blocks
    of its own, which hold these layers alone. Empty: a block holds all layers.
    """

    layers: tuple[LayerKV, ...]
    block_size: int = 16
    codec: str = "bf16"
    window_pages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.codec not in KV_VALUE_BYTES:
            raise ConfigError(f"unknown KV cache dtype {self.codec!r}; choose one of {', '.join(KV_VALUE_BYTES)}")
        if self.block_size <= 0 or self.block_size % PAGE_POSITIONS or self.block_size > 1024:
            raise ConfigError(f"block size is {self.block_size}; give a multiple of {PAGE_POSITIONS} up to 1024")

        assert not self.window_pages or (len(self.window_pages) == len(self.windows) and min(self.window_pages) > 0)

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows that layers read, ascending, each once."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        """The group of full attention, which names texts and may be without layers, then one for each window."""
        windows = self.windows if self.window_pages else ()

        def group(window: int | None, num_pages: int) -> KVGroup:
            own = [i for i, layer in enumerate(self.layers) if (layer.window if windows else None) == window]
            spec = KVSpec(tuple(self.layers[i] for i in own), self.block_size, self.codec)
            return KVGroup(tuple(own), spec, window, num_pages)

        return (group(None, 0), *map(group, windows, self.window_pages))

    @property
    def pages_per_block(self) -> int:
        """Pages of 16 positions in a block."""
        return self.block_size // PAGE_POSITIONS

    def page_bytes(self, layer: int) -> int:
        """Bytes of one page (16 positions, one KV head) of a layer: keys and values."""
        vector_bytes = padded(self.layers[layer].head_dim, LANES) * KV_VALUE_BYTES[self.codec]
        return 2 * PAGE_POSITIONS * (vector_bytes + KV_SCALE_BYTES[self.codec])

    def layer_bytes(self, layer: int) -> int:
        """Bytes that one block holds of a layer."""
        return self.layers[layer].num_kv_heads * self.pages_per_block * self.page_bytes(layer)

    def layer_offset(self, layer: int) -> int:
        """Where a layer begins within a block of all layers, in bytes."""
        return sum(self.layer_bytes(i) for i in range(layer))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return sum(self.layer_bytes(i) for i in range(len(self.layers)))

    def blocks_in(self, memory_bytes: int) -> int:
        """Blocks that fit in so much memory beside the pages of window groups, whose number stays. Raises ConfigError
        where all layers are in window groups, so that another number of blocks is no other size."""
        full, *windows = self.groups
        if not full.layers:
            raise ConfigError(
                "every layer of this model reads a window, and their pages keep their number while it runs; load the "
                "model again with another kv_cache_memory_bytes"
            )
        taken = sum(group.num_pages * group.spec.block_bytes for group in windows)
        return max(memory_bytes - taken, 0) // full.spec.block_bytes

    def memory_bytes(self, num_blocks: int) -> int:
        """Bytes of so many blocks beside the pages of window groups: the least in which `blocks_in` finds them."""
        full, *windows = self.groups
        return num_blocks * full.spec.block_bytes + sum(group.num_pages * group.spec.block_bytes for group in windows)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token position, all layers, padding included."""
        return self.block_bytes // self.block_size

    @property
    def bits_per_value(self) -> float:
        """Bits of a block, scales and padding included, for each number of keys and values that it holds."""
        values = self.block_size * sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.layers)
        return 8 * self.block_bytes / values

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)
