"""Layers that read a window, with pages of their own: the bits are those of the same layers with all positions kept.

A sequence's pages behind its window are taken back as it goes on, wiped, and given out again.
"""

from __future__ import annotations

import numpy as np
import pytest

from pagemill.base.transfer import Copy, Moves
from pagemill.kernels.batch import Batch, ModelExecutor
from pagemill.kernels.native import NativeExecutor
from pagemill.kernels.target import available_targets
from tests.fixtures.plans import Shape, batch, native, reference, tokens

TARGETS = available_targets()
CODECS = ["f32", "bf16", "int8"]
SIZE = 16
SHAPES = {
    "all layers": Shape(layers=2, vocab=50, window=37),
    "every other layer": Shape(layers=4, vocab=50, window=37, full_layers=(0, 2)),
    "beyond a split": Shape(layers=2, vocab=50, window=300, full_layers=(1,), head_dim=40),
}


class Pages:
    """Pages of one sequence in one window group, out of a free list that sequences share. Mutated by `table`."""

    def __init__(self, window: int, free: list[int]) -> None:
        self.window, self.free, self.pages = window, free, {}  # type: int, list[int], dict[int, int]

    def table(self, start: int, end: int) -> list[int]:
        """Pages for a step over positions start .. end - 1; what none of them reads any more is let go of."""
        first, count = max(start - self.window + 1, 0) // SIZE, -(-end // SIZE)
        for block in [each for each in self.pages if each < first]:
            self.free.append(self.pages.pop(block))
        for block in range(max(first, start // SIZE), count):
            if block not in self.pages:
                self.pages[block] = self.free.pop(0)
        return [self.pages.get(block, -1) for block in range(count)]


def windowed(*parts: tuple[np.ndarray, int, list[int], list[int]], every_row: bool = False) -> Batch:
    """parts: (tokens, start position, block table, table of the window group) of each sequence."""
    made = batch(*(part[:3] for part in parts), every_row=every_row)
    tables = np.full((1, *made.tables.shape), -1, np.int32)
    for row, part in enumerate(parts):
        tables[0, row, : len(part[3])] = part[3]
    return Batch(made.tokens, made.positions, made.starts, made.tables, made.logit_rows, tables)


def in_chunks(executor: ModelExecutor, ids: np.ndarray, pages: Pages, size: int) -> np.ndarray:
    """Logits of every row, `size` rows a step; a page is wiped before it is given out again."""
    parts = []
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        before = set(pages.pages.values())
        table = pages.table(start, end)
        stale = [page for page in before if page not in pages.pages.values()]
        executor.move(Moves((), (), (Moves(tuple(stale)),)))
        blocks = list(range(60, 60 - -(-end // SIZE), -1))
        parts.append(executor.forward(windowed((ids[start:end], start, blocks, table), every_row=True)))
    return np.concatenate(parts)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", SHAPES)
def test_pages_behind_the_window_can_go_and_no_bit_changes(target: str, codec: str, name: str) -> None:
    shape = SHAPES[name]
    assert shape.window is not None
    ids = tokens(620 if shape.window > 256 and target != "scalar" else 340, 50)
    expected = native(shape, target, codec=codec).forward(batch((ids, 0, list(range(40))), every_row=True))
    for size, threads in ((64, 2), (17, 1)):
        most = (shape.window + size + SIZE - 3) // SIZE + 1
        executor = native(shape, target, codec=codec, threads=threads, window_pages=(most,))
        assert np.array_equal(in_chunks(executor, ids, Pages(shape.window, list(range(most))), size), expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("codec", CODECS)
def test_sequences_of_one_step_read_their_own_pages(target: str, codec: str) -> None:
    """Decoding and a prompt side by side, and three texts that have all pages but the last in common."""
    shape = Shape(layers=3, vocab=50, window=300, full_layers=(1,))
    whole = native(shape, target, codec=codec)
    executor = native(shape, target, codec=codec, window_pages=(90,))
    prompts = [tokens(count, 50, seed=count) for count in (560, 130, 33, 1)]
    blocks = [list(range(37)), list(range(40, 50)), [60, 61, 62], [70]]
    free = list(range(90))
    held = [Pages(300, free) for _ in prompts]
    for ids, pages, table in zip(prompts, held, blocks, strict=True):
        for start in range(0, len(ids) - 1, 100):
            end = min(start + 100, len(ids) - 1)
            executor.forward(windowed((ids[start:end], start, table, pages.table(start, end))))
    steps = [
        (ids[-1:], len(ids) - 1, table, pages.table(len(ids) - 1, len(ids)))
        for ids, pages, table in zip(prompts, held, blocks, strict=True)
    ]
    twins = []
    for twin in (3, 4):  # the text of the first, but for its last token: with a block and a page of their own
        block, page, first = 87 + twin, free.pop(), steps[0]
        executor.move(Moves((), (Copy(first[2][34], block, 16),), (Moves((), (Copy(first[3][34], page, 16),)),)))
        steps.append((np.array([twin], np.int32), 559, [*first[2][:34], block], [*first[3][:34], page]))
        twins.append(np.append(prompts[0][:-1], np.int32(twin)))
    new = tokens(70, 50, seed=9)
    steps.append((new, 0, list(range(80, 85)), Pages(300, free).table(0, 70)))
    before = executor._model.shared_splits
    together = executor.forward(windowed(*steps))
    assert executor._model.shared_splits > before, "pages that several have in common are read once"
    for row, ids in zip(together, [*prompts, *twins, new], strict=True):
        assert np.array_equal(row, whole.forward(batch((ids, 0, list(range(40))), every_row=True))[-1])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_agrees_with_itself_and_with_native_code(codec: str, name: str) -> None:
    shape = SHAPES[name]
    assert shape.window is not None
    ids, most = tokens(340, 50), (shape.window + 64 + SIZE - 3) // SIZE + 1
    expected = reference(shape, codec=codec).forward(batch((ids, 0, list(range(40))), every_row=True))
    grouped = reference(shape, codec=codec, window_pages=(most,))
    found = in_chunks(grouped, ids, Pages(shape.window, list(range(most))), 64)
    np.testing.assert_allclose(found, expected, atol=2e-5 if codec == "f32" else 5e-2)
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1)) or codec != "f32"


@pytest.mark.parametrize("target", [*TARGETS, "reference"])
def test_moves_reach_the_pages_of_their_group_alone(target: str) -> None:
    shape = Shape(layers=2, vocab=50, window=20, full_layers=(0,))
    executor: ModelExecutor
    executor = (
        reference(shape, window_pages=(4,)) if target == "reference" else native(shape, target, window_pages=(4,))
    )
    ids, more = tokens(40, 50), tokens(1, 50, seed=2)
    executor.forward(windowed((ids[:20], 0, [5, 6, 7], [0, 1, -1])))
    executor.forward(windowed((ids[20:], 20, [5, 6, 7], [0, 1, 2])))
    expected = executor.forward(windowed((more, 40, [5, 6, 7], [-1, 1, 2])))
    executor.move(Moves((0, 1, 2, 3), (Copy(5, 0, 16),), (Moves((3,), (Copy(2, 3, 8),)),)))
    assert np.array_equal(executor.forward(windowed((more, 40, [0, 6, 7], [-1, 1, 3]))), expected)
    executor.move(Moves((), (), (Moves((1,)),)))
    assert not np.array_equal(executor.forward(windowed((more, 40, [0, 6, 7], [-1, 1, 3]))), expected)


def test_a_larger_cache_keeps_the_pages_of_windows() -> None:
    shape = Shape(layers=2, vocab=50, window=20, full_layers=(0,))
    for executor in (native(shape, TARGETS[0], window_pages=(4,)), reference(shape, window_pages=(4,))):
        ids, more = tokens(40, 50), tokens(1, 50, seed=2)
        executor.forward(windowed((ids, 0, [5, 6, 7], [0, 1, 2])))
        expected = executor.forward(windowed((more, 40, [5, 6, 7], [-1, 1, 2])))
        executor.resize(8)
        assert np.array_equal(executor.forward(windowed((more, 40, [5, 6, 7], [-1, 1, 2]))), expected)


def test_layers_that_all_read_a_window_leave_no_memory_to_the_first_group() -> None:
    executor = native(Shape(layers=2, vocab=50, window=20), TARGETS[0], window_pages=(4,))
    full, window = executor.kv_spec.groups
    assert (full.spec.block_bytes, full.layers) == (0, ())
    assert (window.layers, window.window, window.num_pages) == ((0, 1), 20, 4)
    assert window.spec.block_bytes == executor.kv_spec.block_bytes
    executor.resize(1000)
    assert executor.forward(windowed((tokens(5, 50), 0, [999], [3]))).shape == (1, 50)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([-1, 1, 2], "block id out of range"),
        ([0, -1, 2], "block id"),
        ([0, 1, 4], "block id"),
        ([-1, 1, -1], "block id"),
    ],
)
def test_pages_that_are_read_must_be_there(table: list[int], message: str) -> None:
    """Window 20 at position 40 reads from 21 on, and at position 34 from 15 on, which is in the first block."""
    executor: NativeExecutor = native(
        Shape(layers=2, vocab=50, window=20, full_layers=(0,)), TARGETS[0], window_pages=(4,)
    )
    executor.forward(windowed((tokens(1, 50), 40, [5, 6, 7], [-1, 1, 2])))
    with pytest.raises(ValueError, match=message):
        executor.forward(windowed((tokens(1, 50), 34, [5, 6, 7], table)))
    with pytest.raises(AssertionError, match="a page that is not held"):
        reference(Shape(layers=2, vocab=50, window=20, full_layers=(0,)), window_pages=(4,)).forward(
            windowed((tokens(1, 50), 34, [5, 6, 7], [-1, 1, 2]))
        )


def test_a_table_for_each_group_is_needed() -> None:
    executor = native(Shape(layers=2, vocab=50, window=20), TARGETS[0], window_pages=(4,))
    with pytest.raises(ValueError, match="one block table for each sequence and KV group"):
        executor.forward(batch((tokens(3, 50), 0, [0])))
