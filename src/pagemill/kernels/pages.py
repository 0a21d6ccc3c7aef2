"""Moves within the KV arena: wiping blocks and copying the first positions of one. Owns the strided views of a page.

Layouts are those of base/kv_spec.py. Layers of one geometry that follow each other are one view, so that a copy is a
few array assignments for the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pagemill.base.kv_spec import KV_VALUE_BYTES, LANES, PAGE_POSITIONS, KVSpec, padded
from pagemill.base.transfer import Copy, Moves

Bytes = NDArray[np.uint8]
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True, eq=False)
class _Views:
    """Layers of one geometry. by_column: arrays [blocks, layers, heads, pages, rows, 16] whose last axis is the
    position (keys, scales). values: [blocks, layers, heads, pages, 16, head_dim]. quads: int8 values
    [.., 4, head_dim, 4], position 4a + b at [a, :, b]."""

    by_column: tuple[NDArray[np.unsignedinteger], ...]
    values: NDArray[np.unsignedinteger] | None
    quads: Bytes | None


class Pages:
    """The blocks of an arena as keys and values. Mutated by `move` (the arena).

    arena: u8 [≥ num_blocks * kv_spec.block_bytes].
    """

    def __init__(self, arena: Bytes, kv_spec: KVSpec, num_blocks: int) -> None:
        size = kv_spec.block_bytes
        self._blocks = arena[: num_blocks * size].reshape(num_blocks, size)
        self._pages_per_block = kv_spec.pages_per_block
        self._views = []
        first = 0
        layers = kv_spec.layers
        for end in range(1, len(layers) + 1):
            same = end < len(layers) and _geometry(kv_spec, end) == _geometry(kv_spec, first)
            if not same:
                self._views.append(_views(self._blocks, kv_spec, first, end))
                first = end

    def move(self, moves: Moves) -> None:
        """Make the wipes, then the copies."""
        for block in moves.wipes:
            self._blocks[block] = 0
        for copy in moves.copies:
            self.copy(copy)

    def copy(self, copy: Copy) -> None:
        """Copy the first positions of a block over those of another, in every layer; nothing else is touched."""
        pages, rest = divmod(copy.num_positions, PAGE_POSITIONS)
        for views in self._views:
            arrays = [*views.by_column]
            arrays += [each for each in (views.values, views.quads) if each is not None]
            for array in arrays:
                array[copy.target, :, :, :pages] = array[copy.source, :, :, :pages]
            if not rest:
                continue
            for array in views.by_column:
                array[copy.target, :, :, pages, :, :rest] = array[copy.source, :, :, pages, :, :rest]
            if views.values is not None:
                views.values[copy.target, :, :, pages, :rest] = views.values[copy.source, :, :, pages, :rest]
            if views.quads is not None:
                quads, (whole, part) = views.quads, divmod(rest, 4)
                quads[copy.target, :, :, pages, :whole] = quads[copy.source, :, :, pages, :whole]
                if part:
                    quads[copy.target, :, :, pages, whole, :, :part] = quads[copy.source, :, :, pages, whole, :, :part]


def _geometry(spec: KVSpec, layer: int) -> tuple[int, int]:
    return spec.layers[layer].num_kv_heads, padded(spec.layers[layer].head_dim, LANES)


def _views(blocks: Bytes, spec: KVSpec, first: int, end: int) -> _Views:
    heads, dim = _geometry(spec, first)
    page = spec.page_bytes(first)
    outer = (len(blocks), end - first, heads, spec.pages_per_block)
    strides = (spec.block_bytes, spec.layer_bytes(first), spec.pages_per_block * page, page)

    def view(offset: int, word_bytes: int, rows: int, columns: int) -> NDArray[np.unsignedinteger]:
        flat = blocks.reshape(-1)[spec.layer_offset(first) + offset :]
        flat = flat[: len(flat) // word_bytes * word_bytes].view(WORDS[word_bytes])
        return as_strided(flat, (*outer, rows, columns), (*strides, columns * word_bytes, word_bytes))

    bytes_of_keys = PAGE_POSITIONS * dim * KV_VALUE_BYTES[spec.codec]
    if spec.codec != "int8":
        word = KV_VALUE_BYTES[spec.codec]
        keys = view(0, word, dim, PAGE_POSITIONS)
        return _Views((keys,), view(bytes_of_keys, word, PAGE_POSITIONS, dim), None)
    quads = as_strided(
        blocks.reshape(-1)[spec.layer_offset(first) + bytes_of_keys :], (*outer, 4, dim, 4), (*strides, dim * 4, 4, 1)
    )
    scales = view(2 * bytes_of_keys, 2, 2, PAGE_POSITIONS)
    return _Views((view(0, 4, dim // 4, PAGE_POSITIONS), scales), None, quads)
