"""Attention: a row's bits depend on nothing but the row, whoever shares its tile, its pages or its step."""

from __future__ import annotations

import numpy as np
import pytest

from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.target import available_targets
from tests.fixtures.plans import Shape, batch, native, tokens

TARGETS = available_targets()
CODECS = ["f32", "bf16", "int8"]
SHAPES = {
    "group 2": Shape(layers=1, vocab=50),
    "group 3, head_dim 64": Shape(layers=1, vocab=50, q_heads=6, head_dim=64),
    "group 7, head_dim 40": Shape(layers=1, vocab=50, q_heads=7, kv_heads=1, head_dim=40),
    "group 1, head_dim 80": Shape(layers=1, vocab=50, q_heads=2, kv_heads=2, head_dim=80),
    "group 8, head_dim 256": Shape(layers=1, vocab=50, q_heads=8, kv_heads=1, head_dim=256),
    "head_dim 12": Shape(layers=1, vocab=50, head_dim=12),
    "window 300": Shape(layers=1, vocab=50, window=300),
    "softcap": Shape(layers=1, vocab=50, softcap=5.0),
}
WIDE = "group 8, head_dim 256"
SPLIT = 256  # positions that sequences with a common prefix may read together


def in_chunks(executor: NativeExecutor, ids: np.ndarray, table: list[int], size: int) -> np.ndarray:
    """Logits of every row, `size` rows a step."""
    parts = [executor.forward(batch((ids[i : i + size], i, table), every_row=True)) for i in range(0, len(ids), size)]
    return np.concatenate(parts)


def shared_splits(executor: NativeExecutor) -> int:
    """(sequence, split) pairs that were read together with another sequence's, since the start."""
    return executor._model.shared_splits


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SHAPES)
def test_rows_have_the_same_bits_in_tiles_of_any_size(target: str, name: str) -> None:
    """300 rows at once, in steps of 1 to 37 rows, and with two threads."""
    ids, table = tokens(300, 50), list(range(19, 0, -1))
    for codec in CODECS if name != WIDE else ["int8"]:
        executor = native(SHAPES[name], target, codec=codec)
        whole = executor.forward(batch((ids, 0, table), every_row=True))
        assert np.array_equal(in_chunks(executor, ids, table, 37), whole)
        for size in (1, 4, 5, 9):  # the last rows only: they see two splits
            executor.forward(batch((ids[:250], 0, table)))
            for i in range(250, 300, size):
                step = executor.forward(batch((ids[i : i + size], i, table), every_row=True))
                assert np.array_equal(step, whole[i : i + size])
        two = native(SHAPES[name], target, codec=codec, threads=2)
        assert np.array_equal(two.forward(batch((ids, 0, table), every_row=True)), whole)


def shared_step(executor: NativeExecutor) -> list[tuple[np.ndarray, int, list[int]]]:
    """Sequences over one prefix of 530 positions, three of them over one of 800; strangers; a prefill.

    Blocks of 32: the common table entries cover 544 and 800 positions, 2 and 3 splits are whole.
    """
    prefix, longer = list(range(30, 47)), [*range(30, 47), *range(10, 18)]
    ids = tokens(900, 50)
    executor.forward(batch((ids[:800], 0, longer)))
    parts = []
    for i, (begin, count, at) in enumerate([(prefix, 1, 545), (prefix, 1, 590), (prefix, 3, 544), (prefix, 1, 551)]):
        table = [*begin, 50 + 2 * i, 51 + 2 * i]
        executor.forward(batch((tokens(at - 544 + 1, 50, seed=i), 544, table)))
        parts.append((tokens(count, 50, seed=20 + i), at, table))
    for i in range(3):
        parts.append((tokens(1, 50, seed=30 + i), 800, [*longer, 60 + i]))
    parts.append((tokens(1, 50, seed=40), 70, [70, 71, 72]))  # shorter than a split
    parts.append((tokens(60, 50, seed=41), 544, [*prefix, 73, 74]))  # many rows: tiles of its own
    parts.append((tokens(1, 50, seed=42), 520, list(range(75, 92))))  # nothing in common
    return parts


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_a_shared_prefix_is_read_together_with_the_same_bits(target: str, threads: int, name: str) -> None:
    for codec in CODECS if name != WIDE else ["int8"]:
        executor = native(SHAPES[name], target, codec=codec, block_size=32, threads=threads)
        parts = shared_step(executor)
        before = shared_splits(executor)
        alone = [executor.forward(batch(part, every_row=True)) for part in parts]
        assert shared_splits(executor) == before
        together = executor.forward(batch(*parts, every_row=True))
        # Two splits for seven sequences, one more for three. The window begins in different splits, but for the three.
        assert shared_splits(executor) - before == (2 * 2 if name == "window 300" else 2 * 6 + 2)
        assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", [1, -1])
def test_sharing_does_not_depend_on_the_order_of_the_sequences(target: str, order: int) -> None:
    executor = native(SHAPES["group 3, head_dim 64"], target, codec="int8", block_size=32, threads=2)
    parts = shared_step(executor)
    alone = {i: executor.forward(batch(part)) for i, part in enumerate(parts)}
    picked = list(range(len(parts)))[::order]
    together = executor.forward(batch(*(parts[i] for i in picked)))
    assert np.array_equal(together, np.concatenate([alone[i] for i in picked]))


@pytest.mark.parametrize("positions", [SPLIT - 1, SPLIT, SPLIT + 16])
def test_only_whole_splits_are_shared(positions: int) -> None:
    """Four sequences that differ from the block of `positions` on."""
    executor = native(SHAPES["group 2"], TARGETS[0], codec="int8", block_size=16, threads=2)
    common = list(range(positions // 16))
    executor.forward(batch((tokens(len(common) * 16, 50), 0, common)))
    tables = [[*common, *range(40 + 4 * i, 44 + 4 * i)] for i in range(4)]
    parts = [(tokens(30, 50, seed=i), len(common) * 16, table) for i, table in enumerate(tables)]
    for part in parts:
        executor.forward(batch(part))
    step = [(tokens(1, 50, seed=9), len(common) * 16 + 30, table) for table in tables]
    executor.forward(batch(*step))
    assert shared_splits(executor) == (0 if positions < SPLIT else 3)


def test_a_forked_sequence_shares_nothing_that_it_has_written_since() -> None:
    """Equal tables, one sequence further on than the other: masks, not tables, say what a row sees."""
    executor = native(SHAPES["group 2"], TARGETS[0], codec="int8", block_size=32, threads=2)
    ids, table = tokens(600, 50), list(range(20))
    executor.forward(batch((ids, 0, table)))
    parts = [(ids[599:600], 599, table), (ids[300:301], 300, table), (ids[100:101], 100, table)]
    alone = [executor.forward(batch(part)) for part in parts]
    assert np.array_equal(executor.forward(batch(*parts)), np.concatenate(alone))
