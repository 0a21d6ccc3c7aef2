"""The arrays of one step, as every executor reads them. Owns shapes and dtypes, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagemill.base.kv_spec import KVSpec
from pagemill.base.transfer import Moves

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of several sequences side by side, prefill and decode mixed.

    tokens, positions: [rows] i32, positions of a sequence consecutive. starts: [num_seqs + 1] i32, first row of each
    sequence and the number of rows. tables: [num_seqs, longest] i32 block ids in order of position.
    logit_rows: [num_logits] i32, rows whose logits are wanted. window_tables: the same as tables for each window group
    of the KV spec, [groups, num_seqs, longest] i32, -1 where a page is not held; None without groups.
    """

    tokens: Int32
    positions: Int32
    starts: Int32
    tables: Int32
    logit_rows: Int32
    window_tables: Int32 | None = None


class ModelExecutor(Protocol):
    """A plan with its weights and its KV arena, ready to run batches."""

    @property
    def kv_spec(self) -> KVSpec: ...

    def resize(self, num_blocks: int) -> None:
        """Have an arena of so many blocks, the first ones with their contents."""
        ...

    def move(self, moves: Moves) -> None:
        """Wipe and copy blocks of the arena, in this order."""
        ...

    def forward(self, batch: Batch) -> Float32:
        """Write the keys and values of every row, return logits [num_logits, vocab] f32."""
        ...

    def forward_best(self, batch: Batch, best_only: bool = False) -> tuple[Float32, Int32]:
        """The same, and the index of each row's largest logit [num_logits] i32 (the first; a NaN counts as largest).

        best_only: no other logit is wanted; what stands elsewhere may be anything then. The arrays are good until the
        next call.
        """
        ...
