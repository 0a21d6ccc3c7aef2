"""What the cache asks the data plane to do with blocks before a step computes: wipes, then copies. No arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the first `num_positions` positions of block `source`, all layers, over those of block `target`.

    The source is not written; what `target` holds behind them is left as it is.
    """

    source: int
    target: int
    num_positions: int


@dataclass(frozen=True, slots=True)
class Moves:
    """Moves of one step, in this order: `wipes` names blocks whose bytes become zero, then `copies` are made.

    Both may be carried out again if a step failed midway: nothing has been computed into their targets until then.
    windows: the same of the pages of each window group, empty where there are none.
    """

    wipes: tuple[int, ...] = ()
    copies: tuple[Copy, ...] = ()
    windows: tuple[Moves, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.wipes or self.copies) or any(self.windows)


NO_MOVES = Moves()
