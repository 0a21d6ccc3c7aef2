"""Dropping cached texts at somebody's word. Owns what every purge does around its own choice of texts."""

from __future__ import annotations

from collections.abc import Callable

from pagemill.cache.sharing import SharedBlocks
from pagemill.engine.engine import Engine


class Purged(int):
    """How many blocks a purge dropped. num_pins: pins that ended with them, whose `unpin` is False from then on."""

    num_pins: int

    def __new__(cls, num_blocks: int, num_pins: int) -> Purged:
        purged = super().__new__(cls, num_blocks)
        purged.num_pins = num_pins
        return purged


def purge(engine: Engine, shared: SharedBlocks, drop: Callable[[], int]) -> Purged:
    """Drop texts of the engine's prefix cache, and wipe their pages before this returns. To be called on the engine's
    thread. drop: does it and returns the number of blocks; what it raises is raised."""
    engine.advance_clock()
    num_forced = shared.leases.num_forced
    count = drop()
    engine.settle()
    return Purged(count, shared.leases.num_forced - num_forced)
