"""The harness with window groups: a store of pages for each, written and re-read as layers that read a window do.

Beside what `harness.py` checks: every position that a token reads in its window has its page and holds what an uncached
run would have written; what a look-up hits is never more than the slow model finds; pages come back as blocks do.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

from pagemill.cache.manager import CacheManager
from pagemill.cache.receipt import Lookup
from pagemill.cache.windows import WindowGroup, WindowSpec
from tests.contracts.cache.harness import BLOCK, Harness, Options
from tests.contracts.cache.slow_index import ViolationError
from tests.fixtures.fake_executor import mix

CHUNK = 8  # most tokens of a step


@dataclass(slots=True)
class WindowedHarness(Harness):
    """A cache with groups of these windows, each of as many pages as `num_pages` says. Mutated by every operation.

    num_shortened: look-ups that hit less than the blocks hold, since a window had let go of what comes next."""

    windows: tuple[int, ...] = (6, 13)
    num_pages: int = 14
    pages: list[list[list[int | None]]] = field(init=False)
    num_shortened: int = 0

    def __post_init__(self) -> None:
        specs = tuple(WindowSpec(each, self.num_pages, CHUNK) for each in self.windows)
        self.make = lambda num_blocks, size, sharing: CacheManager(
            num_blocks, size, "paged", replace(sharing, windows=specs)
        )
        self.pages = [[[None] * BLOCK for _ in range(self.num_pages)] for _ in specs]
        Harness.__post_init__(self)

    @property
    def groups(self) -> list[WindowGroup]:
        """Of the cache."""
        assert self.cache.shared is not None
        assert self.cache.shared.windows is not None
        return self.cache.shared.windows.groups

    def check_hit(self, lookup: Lookup, options: Options, expected: tuple[int, int]) -> None:
        """A hit may end earlier where a window lacks what comes next; `compute_windows` tells one that is too long."""
        if lookup.num_hit > sum(expected):
            raise ViolationError(f"{lookup} found more than {expected[0]} tokens in blocks and {expected[1]} behind")
        self.num_shortened += lookup.num_hit < expected[0]

    def compute(self, seq_id: int, most: int) -> None:
        """In steps of a chunk."""
        while most > 0 and self.live[seq_id].committed < len(self.live[seq_id].tokens):
            Harness.compute(self, seq_id, min(most, CHUNK))
            most -= CHUNK

    def reach(self, seq_id: int, end: int) -> tuple[array[int], ...]:
        """As the scheduler asks for pages before a step."""
        return self.cache.window_tables(self.cache.blocks_of(seq_id), end)

    def compute_windows(self, tokens: array[int], start: int, end: int, tables: tuple[array[int], ...]) -> None:
        """Each position is read back before the next is written."""
        values, value = [], 0
        for token in tokens[:end]:
            value = mix(value, token)
            values.append(value)
        for store, table, window in zip(self.pages, tables, self.windows, strict=True):
            for position in range(start, end):
                for read in range(max(position - window + 1, 0), position):
                    page = table[read // BLOCK]
                    if page < 0 or store[page][read % BLOCK] != values[read]:
                        raise ViolationError(f"position {position} reads {read} in a window of {window}: stale")
                store[table[position // BLOCK]][position % BLOCK] = values[position]

    def left_of(self, seq_id: int, committed: int) -> int:
        """What a window has let go of is computed again."""
        left = self.cache.num_committed(seq_id)
        if left > committed:
            raise ViolationError(f"sequence {seq_id} went back to {committed} tokens and has {left} committed")
        return left

    def move_once(self) -> None:
        moves = self.cache.moves()
        for store, each in zip(self.pages, moves.windows, strict=bool(moves.windows)):
            for page in each.wipes:
                store[page] = [None] * BLOCK
            for copy in each.copies:
                store[copy.target][: copy.num_positions] = store[copy.source][: copy.num_positions]
        Harness.move_once(self)

    def snapshot(self) -> object:
        pages = [(dict(each.pages), each.num_reserved) for each in self.groups]
        return Harness.snapshot(self), pages

    def finish(self) -> None:
        Harness.finish(self)
        held = [each for each in self.groups if each.pages or each.num_reserved or each.copies]
        if held or any(value is not None for store in self.pages for page in store for value in page):
            raise ViolationError("something is left at the end in the pages of a window")
