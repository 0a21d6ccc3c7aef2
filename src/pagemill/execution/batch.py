"""From a step plan to the arrays that executors read. Owns the packing of rows and block tables, nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagemill.base.step import SequenceStep, StepPlan
from pagemill.kernels.batch import Batch


class BatchBuilder:
    """Builds one batch per step. Mutated by `build`: the table array is kept between steps and grows when needed.

    block_size: positions per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((1, 8), np.int32)

    def build(self, plan: StepPlan) -> Batch:
        """Rows in the plan's order. logit_rows: the last row of each sequence that samples."""
        sequences = plan.sequences
        rows = plan.num_tokens
        tokens, positions = np.empty(rows, np.int32), np.empty(rows, np.int32)
        starts = np.zeros(len(sequences) + 1, np.int32)
        logit_rows: list[int] = []
        tables = self._table_array(sequences)
        at = 0
        for i, sequence in enumerate(sequences):
            count = len(sequence.token_ids)
            if count == 1:
                tokens[at], positions[at] = sequence.token_ids[0], sequence.start
            else:
                tokens[at : at + count] = sequence.token_ids
                positions[at : at + count] = np.arange(sequence.start, sequence.start + count, dtype=np.int32)
            at += count
            starts[i + 1] = at
            num_blocks = self._num_blocks(sequence)
            tables[i, :num_blocks] = sequence.block_table[:num_blocks]
            if sequence.sample:
                logit_rows.append(at - 1)
        return Batch(tokens, positions, starts, tables, np.array(logit_rows, np.int32))

    def _num_blocks(self, sequence: SequenceStep) -> int:
        return -(-sequence.end // self._block_size)

    def _table_array(self, sequences: tuple[SequenceStep, ...]) -> NDArray[np.int32]:
        longest = max(self._num_blocks(s) for s in sequences)
        if self._tables.shape[0] < len(sequences) or self._tables.shape[1] < longest:
            shape = (max(len(sequences), self._tables.shape[0]), max(2 * longest, self._tables.shape[1]))
            self._tables = np.zeros(shape, np.int32)
        return self._tables[: len(sequences)]
