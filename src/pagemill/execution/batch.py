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

    A step that only decodes writes tokens and positions through `array`, whose memory numpy reads: with the processor's
    caches emptied by the step before, a few numpy calls take longer than all the rest of a small batch.

    block_size: positions per block. num_windows: window groups, whose tables are written anew for each step.
    """

    def __init__(self, block_size: int, num_windows: int = 0) -> None:
        self._block_size = block_size
        self._num_windows = num_windows
        self._width = 8  # of _tables
        self._tables = np.zeros((1, self._width), np.int32)
        self._window_tables: Int32 | None = None
        self._held = [array("i")]  # what each row of _tables holds
        self._tokens, self._positions = array("i", [0]), array("i", [0])
        self._single = self._make_single(1)

    def build(self, sequences: Sequence[SequenceStep]) -> Batch:
        """Rows in the plan's order. logit_rows: the last row of each sequence that samples, then those of the prompt
        positions that are to be reported (`prompt_logprobs.num_positions`).

        The arrays are good until the next call. Raises IntegrityError for a table that is shorter than its sequence.
        """
        count, longest = len(sequences), 0
        for sequence in sequences:
            if len(sequence.block_table) > longest:
                longest = len(sequence.block_table)
        if len(self._tokens) < count or self._width < longest:
            self._make_room(count, longest)
        tokens, positions, held, size = self._tokens, self._positions, self._held, self._block_size
        single = not self._num_windows  # every sequence has one token and samples
        for row, sequence in enumerate(sequences):
            ids, start, table = sequence.token_ids, sequence.start, sequence.block_table
            if len(table) * size < start + len(ids):  # behind the table stands what another sequence left in this row
                raise IntegrityError(
                    f"sequence {sequence.seq_id} has {len(table)} blocks of {size} positions for {sequence.end}; "
                    f"report this as a bug"
                )
            if table != held[row]:
                self._tables[row, : len(table)] = table
                held[row] = array("i", table)
            if len(ids) != 1 or not sequence.sample:
                single = False
            tokens[row], positions[row] = ids[0], start
        if single:
            if len(self._single.tokens) != count:
                self._single = self._make_single(count)
            return self._single
        if self._num_windows:
            self._window_tables = self._write_windows(sequences)
        return self._build_mixed(sequences, [len(s.token_ids) for s in sequences], self._tables[:count])

    def _make_room(self, count: int, longest: int) -> None:
        """Arrays for so many sequences with tables of so many blocks, forgetting what they held."""
        rows = max(count, len(self._tables))
        if self._width < longest:
            self._width = 2 * longest
        self._tables = np.zeros((rows, self._width), np.int32)
        self._held = [array("i")] * rows
        self._tokens, self._positions = array("i", bytes(4 * rows)), array("i", bytes(4 * rows))
        self._single = self._make_single(count)

    def _write_windows(self, sequences: Sequence[SequenceStep]) -> Int32:
        """Tables of the window groups, as wide as those of blocks. Raises IntegrityError where one is missing."""
        made = np.full((self._num_windows, len(sequences), self._tables.shape[1]), -1, np.int32)
        for row, sequence in enumerate(sequences):
            tables = sequence.window_tables
            if len(tables) != self._num_windows or any(len(each) != len(sequence.block_table) for each in tables):
                raise IntegrityError(
                    f"sequence {sequence.seq_id} brings {len(tables)} tables of window groups for {self._num_windows}, "
                    f"or of other lengths than {len(sequence.block_table)}; report this as a bug"
                )
            for group, table in enumerate(tables):
                made[group, row, : len(table)] = table
        return made

    def _make_single(self, count: int) -> Batch:
        """A batch of `count` sequences of one row each, over the arrays that are kept."""
        rows = np.arange(count + 1, dtype=np.int32)
        tokens, positions = (np.frombuffer(each, np.int32)[:count] for each in (self._tokens, self._positions))
        return Batch(tokens, positions, rows, self._tables[:count], rows[:count])

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
        logits = np.array(logit_rows + prompt_rows, np.int32)
        return Batch(tokens, positions, starts, tables, logits, self._window_tables)
