"""Copies and wipes within the arena: exactly the asked positions, of every layer, in every codec."""

from __future__ import annotations

import numpy as np
import pytest

from pagemill.base.kv_spec import KVSpec, LayerKV
from pagemill.base.transfer import Copy, Moves
from pagemill.kernels.pages import Pages
from pagemill.kernels.target import available_targets
from tests.fixtures.plans import Shape, batch, native, tokens

LAYERS = (LayerKV(2, 16), LayerKV(2, 16), LayerKV(1, 40), LayerKV(3, 64))


def positions_of(spec: KVSpec, block: np.ndarray, position: int) -> list[np.ndarray]:
    """The bytes of one position, by the layout in base/kv_spec.py, element by element."""
    found = []
    page, slot = divmod(position, 16)
    for index, layer in enumerate(spec.layers):
        dim = -(-layer.head_dim // 16) * 16
        for head in range(layer.num_kv_heads):
            start = spec.layer_offset(index) + (head * spec.pages_per_block + page) * spec.page_bytes(index)
            data = block[start : start + spec.page_bytes(index)]
            if spec.codec == "int8":
                found.append(data[: dim * 16].reshape(dim // 4, 16, 4)[:, slot])
                found.append(data[dim * 16 : 2 * dim * 16].reshape(4, dim, 4)[slot // 4, :, slot % 4])
                found.append(data[2 * dim * 16 :].reshape(2, 16, 2)[:, slot])
            else:
                size = {"f32": 4, "f16": 2, "bf16": 2}[spec.codec]
                found.append(data[: dim * 16 * size].reshape(dim, 16, size)[:, slot])
                found.append(data[dim * 16 * size :].reshape(16, dim, size)[slot])
    return [each.copy() for each in found]


@pytest.mark.parametrize("codec", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("count", [1, 3, 4, 15, 16, 17, 31, 47, 48])
def test_a_copy_moves_the_first_positions_and_nothing_else(codec: str, block_size: int, count: int) -> None:
    if count > block_size:
        count = block_size
    spec = KVSpec(LAYERS, block_size, codec)
    arena = np.random.default_rng(1).integers(0, 256, 5 * spec.block_bytes, dtype=np.uint8)
    blocks = arena.reshape(5, -1)
    before = blocks.copy()
    Pages(arena, spec, 5).move(Moves((4,), (Copy(1, 3, count),)))
    for position in range(block_size):
        expected = before[1] if position < count else before[3]
        for got, wanted in zip(
            positions_of(spec, blocks[3], position), positions_of(spec, expected, position), strict=True
        ):
            assert np.array_equal(got, wanted), position
    assert np.array_equal(blocks[:3], before[:3])
    assert not blocks[4].any()


@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("target", available_targets())
def test_going_on_from_a_copied_part_gives_the_bits_of_one_piece(codec: str, target: str) -> None:
    executor = native(Shape(layers=2, q_heads=4, kv_heads=2, vocab=64), target, codec=codec)
    ids = tokens(60, 64)
    expected = executor.forward(batch((ids, 0, [0, 1, 2, 3])))
    for hit in (1, 17, 30, 47, 59):
        whole, rest = divmod(hit, 16)
        table = [*range(whole), *range(20, 24 - whole)]
        executor.move(Moves(tuple(range(20, 24)), (Copy(whole, 20, rest),)))
        assert np.array_equal(executor.forward(batch((ids[hit:], hit, table))), expected), hit
