"""Batches of consecutive steps, whose arrays are the same memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.base.errors import IntegrityError
from pagemill.base.params import SamplingParams
from pagemill.base.step import SequenceStep
from pagemill.execution.batch import BatchBuilder
from pagemill.kernels.batch import Batch

BLOCK = 4
PARAMS = SamplingParams(temperature=0.0)


def row(seq_id: int, start: int, token_ids: Sequence[int], table: Sequence[int], sample: bool = True) -> SequenceStep:
    return SequenceStep(seq_id, array("i", token_ids), start, array("i", table), sample, PARAMS, 0)


def check(batch: Batch, rows: list[SequenceStep]) -> None:
    """The batch holds these rows and nothing else."""
    assert batch.tokens.tolist() == [token for each in rows for token in each.token_ids]
    assert batch.positions.tolist() == [each.start + i for each in rows for i in range(len(each.token_ids))]
    ends = np.cumsum([len(each.token_ids) for each in rows]).tolist()
    assert batch.starts.tolist() == [0, *ends]
    asked = [end - 1 for end, each in zip(ends, rows, strict=True) if each.sample]
    assert batch.logit_rows.tolist() == asked
    assert len(batch.tables) == len(rows)
    for held, each in zip(batch.tables.tolist(), rows, strict=True):
        assert held[: len(each.block_table)] == list(each.block_table)
    for array_of_batch in (batch.tokens, batch.positions, batch.starts, batch.tables, batch.logit_rows):
        assert array_of_batch.dtype == np.int32


ROWS = st.tuples(st.integers(0, 30), st.integers(1, 5), st.booleans(), st.integers(0, 3))
STEPS = st.lists(st.lists(ROWS, min_size=1, max_size=9), min_size=1, max_size=8)


@given(STEPS)
def test_a_step_holds_its_own_rows_whatever_came_before(steps: list[list[tuple[int, int, bool, int]]]) -> None:
    builder = BatchBuilder(BLOCK)
    for number, wanted in enumerate(steps):
        rows = []
        for index, (start, count, sample, spare) in enumerate(wanted):
            num_blocks = -(-(start + count) // BLOCK) + spare
            table = [1000 * number + 50 * index + i for i in range(num_blocks)]
            rows.append(row(index, start, range(number, number + count), table, sample))
        check(builder.build(rows), rows)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_steps_that_only_decode_hold_their_own_rows(counts: list[int]) -> None:
    builder = BatchBuilder(BLOCK)
    for start, count in enumerate(counts):
        rows = [row(i, start, [start + i], range(i, i + 1 + start // BLOCK)) for i in range(count)]
        check(builder.build(rows), rows)


def test_a_table_that_changed_in_place_is_read_again() -> None:
    builder = BatchBuilder(BLOCK)
    table = array("i", [3, 5])
    step = SequenceStep(1, array("i", [7]), 5, table, True, PARAMS, 0)
    assert builder.build([step]).tables[0, :2].tolist() == [3, 5]
    table[0] = 9
    assert builder.build([step]).tables[0, :2].tolist() == [9, 5]


def test_equal_decode_steps_make_no_new_arrays() -> None:
    builder = BatchBuilder(BLOCK)
    first = builder.build([row(1, 3, [7], [2]), row(2, 0, [8], [3])])
    assert builder.build([row(1, 4, [9], [2, 4]), row(2, 1, [5], [3])]) is first


@pytest.mark.parametrize("count", [1, 2])
def test_a_table_shorter_than_its_sequence_is_refused_and_the_next_step_is_whole(count: int) -> None:
    builder = BatchBuilder(BLOCK)
    with pytest.raises(IntegrityError, match="sequence 2 has 1 blocks of 4 positions for"):
        builder.build([row(1, 0, [1], [6]), row(2, BLOCK, range(count), [7])])
    rows = [row(1, 1, [2], [6]), row(2, BLOCK, range(count), [7, 8])]
    check(builder.build(rows), rows)


def windowed(seq_id: int, start: int, count: int, table: Sequence[int], *pages: Sequence[int]) -> SequenceStep:
    return row(seq_id, start, range(count), table)._replace(window_tables=tuple(array("i", each) for each in pages))


def test_tables_of_window_groups_stand_beside_those_of_blocks() -> None:
    builder = BatchBuilder(BLOCK, num_windows=2)
    for _ in range(2):
        rows = [windowed(1, 9, 1, [4, 5, 6], [-1, 1, 2], [0, 3, 9]), windowed(2, 0, 3, [7], [5], [6])]
        batch = builder.build(rows)
        check(batch, rows)
        assert batch.window_tables is not None
        assert batch.window_tables.shape == (2, *batch.tables.shape)
        assert batch.window_tables[:, 0, :3].tolist() == [[-1, 1, 2], [0, 3, 9]]
        assert batch.window_tables[:, 1, :1].tolist() == [[5], [6]]
        assert (batch.window_tables[:, 0, 3:] == -1).all()
        assert (batch.window_tables[:, 1, 1:] == -1).all(), "nothing of the step before"


@pytest.mark.parametrize("pages", [[], [[1, 2]], [[1, 2], [1]], [[1, 2], [1, 2], [1, 2]]])
def test_tables_of_window_groups_that_are_missing_are_our_mistake(pages: list[list[int]]) -> None:
    with pytest.raises(IntegrityError, match=r"sequence 8 brings .* tables of window groups for 2"):
        BatchBuilder(BLOCK, num_windows=2).build([windowed(8, 5, 1, [3, 4], *pages)])


def test_without_window_groups_there_are_no_tables_of_them() -> None:
    assert BatchBuilder(BLOCK).build([row(1, 0, [1, 2], [3])]).window_tables is None
