"""From a step plan to the arrays that executors read. Owns the packing of rows and block tables, nothing else."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pagemill.base.errors import IntegrityError
from pagemill.base.step import SequenceStep
from pagemill.decoding.prompt_logprobs import num_positions
from pagemill.kernels.batch import Batch

Int32 = NDArray[np.int32]


class BatchBuilder:
    """Builds one batch per step. Mutated by `build`: the arrays are kept between steps and grow when needed, and a
    block table is copied where it differs from what its row held.

    block_size: positions per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((1, 8), np.int32)
        self._held: list[array[int]] = []  # what each row of _tables holds
        self._single = (np.arange(2, dtype=np.int32), np.zeros(1, np.int32))

    def build(self, sequences: Sequence[SequenceStep]) -> Batch:
        """Rows in the plan's order. logit_rows: the last row of each sequence that samples, then those of the prompt
        positions that are to be reported (`prompt_logprobs.num_positions`).

        The arrays are good until the next call. Raises IntegrityError for a table that is shorter than its sequence.
        """
        tables = self._table_array(sequences)
        counts = [len(s.token_ids) for s in sequences]
        if max(counts) == 1 and False not in [s.sample for s in sequences]:
            tokens = np.array([s.token_ids[0] for s in sequences], np.int32)
            positions = np.array([s.start for s in sequences], np.int32)
            starts, logit_rows = self._single_rows(len(sequences))
            return Batch(tokens, positions, starts, tables, logit_rows)
        return self._build_mixed(sequences, counts, tables)

    def _build_mixed(self, sequences: Sequence[SequenceStep], counts: list[int], tables: Int32) -> Batch:
        starts = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        rows = int(starts[-1])
        tokens, positions = np.empty(rows, np.int32), np.empty(rows, np.int32)
        logit_rows: list[int] = []
        prompt_rows: list[int] = []
        at = 0
        for sequence, count in zip(sequences, counts, strict=True):
            if count == 1:
                tokens[at], positions[at] = sequence.token_ids[0], sequence.start
            else:
                tokens[at : at + count] = sequence.token_ids
                positions[at : at + count] = np.arange(sequence.start, sequence.start + count, dtype=np.int32)
            if sequence.params.prompt_logprobs is not None:
                prompt_rows += range(at, at + num_positions(sequence))
            at += count
            if sequence.sample:
                logit_rows.append(at - 1)
        return Batch(tokens, positions, starts, tables, np.array(logit_rows + prompt_rows, np.int32))

    def _single_rows(self, count: int) -> tuple[Int32, Int32]:
        """starts and logit_rows of `count` sequences of one row each."""
        starts, rows = self._single
        if len(rows) < count:
            starts, rows = self._single = np.arange(2 * count + 1, dtype=np.int32), np.arange(2 * count, dtype=np.int32)
        return starts[: count + 1], rows[:count]

    def _table_array(self, sequences: Sequence[SequenceStep]) -> Int32:
        tables = [s.block_table for s in sequences]
        longest = max(map(len, tables))
        if len(self._tables) < len(tables) or self._tables.shape[1] < longest:
            shape = (max(len(tables), len(self._tables)), max(2 * longest, self._tables.shape[1]))
            self._tables = np.zeros(shape, np.int32)
            self._held = []
        held = self._held
        held += [array("i")] * (len(tables) - len(held))
        for row, (sequence, table) in enumerate(zip(sequences, tables, strict=True)):
            if len(table) * self._block_size < sequence.end:  # behind it stands what another sequence left in this row
                raise IntegrityError(
                    f"sequence {sequence.seq_id} has {len(table)} blocks of {self._block_size} positions for "
                    f"{sequence.end}; report this as a bug"
                )
            if table != held[row]:
                self._tables[row, : len(table)] = table
                held[row] = array("i", table)
        return self._tables[: len(tables)]
