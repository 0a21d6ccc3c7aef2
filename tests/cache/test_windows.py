"""Groups whose layers read a window: what a hit needs of them, what goes earlier, and that nothing stale is ever read.

The executor has no model. It keeps a value for each position in the block of full attention and in each group's page,
derived from all tokens before it, and before it writes a position it reads back all that the position reads.
"""

from __future__ import annotations

import random
from array import array
from contextlib import suppress

import pytest

from pagemill.base.errors import CapacityError, IntegrityError, RequestError
from pagemill.base.params import CacheOptions
from pagemill.base.transfer import Moves
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.cache.receipt import Lookup
from pagemill.cache.windows import WindowGroup, Windows, WindowSpec
from tests.fixtures.fake_executor import mix

SIZE = 4
OWN = CacheOptions()
ALL = 999


class Mill:
    """A cache with window groups and the values in its pages. Mutated by every operation; each verifies."""

    def __init__(self, num_blocks: int, *specs: WindowSpec, policy: str = "lru") -> None:
        self.specs = specs
        self.cache = CacheManager(num_blocks, SIZE, "paged", SharingConfig(policy=policy, windows=specs))
        shared = self.cache.shared
        assert shared is not None
        assert shared.windows is not None
        self.shared, self.windows = shared, shared.windows
        self.stores = [
            [[None] * SIZE for _ in range(count)] for count in (num_blocks, *(each.num_pages for each in specs))
        ]  # type: list[list[list[int | None]]]
        self.texts: dict[int, array[int]] = {}
        self.next_id = 0

    def open(self, tokens: list[int], options: CacheOptions = OWN) -> Lookup | None:
        known = array("i", tokens)
        possible = self.cache.can_open(len(tokens), 999, 0, known, options)
        before = self.cache.stats(), [dict(group.pages) for group in self.windows.groups]
        self.next_id += 1
        try:
            lookup = self.cache.open(self.next_id, len(tokens), 999, known, options)
        except CapacityError:
            assert not possible
            assert before == (self.cache.stats(), [dict(group.pages) for group in self.windows.groups])
            return None
        assert possible
        self.texts[self.next_id] = known
        self.cache.verify()
        return lookup

    def move(self) -> None:
        """What the data plane does before a step, in every group."""
        for _ in range(2):
            moves = [self.cache.moves(), *(group.moves() for group in self.windows.groups)]
            for store, each in zip(self.stores, moves, strict=True):
                for page in each.wipes:
                    store[page] = [None] * SIZE
                for copy in each.copies:
                    store[copy.target][: copy.num_positions] = store[copy.source][: copy.num_positions]
            for group, each in zip(self.windows.groups, moves[1:], strict=True):
                group.moved(each)
            self.cache.moved(moves[0])
        self.cache.verify()

    def compute(self, seq_id: int, most: int = ALL) -> None:
        text, start = self.texts[seq_id], self.cache.num_committed(seq_id)
        end = min(start + most, len(text), *(start + each.chunk for each in self.specs))
        tables = [self.cache.block_table(seq_id), *self.cache.window_tables(self.cache.blocks_of(seq_id), end)]
        self.move()
        values, value = [], 0
        for token in text:
            value = mix(value, token)
            values.append(value)
        for position in range(start, end):
            for index, (store, table) in enumerate(zip(self.stores, tables, strict=True)):
                first = 0 if not index else max(position - self.specs[index - 1].window + 1, 0)
                for read in range(first, position):
                    page = table[read // SIZE]
                    assert page >= 0, f"position {read}, which position {position} reads, is not kept"
                    assert store[page][read % SIZE] == values[read], f"position {read} of group {index} is stale"
                store[table[position // SIZE]][position % SIZE] = values[position]
        self.cache.commit(seq_id, end)
        self.cache.verify()
        if end < len(text) and most == ALL:
            self.compute(seq_id)

    def run(self, tokens: list[int], options: CacheOptions = OWN) -> Lookup:
        """Open, compute and close a text."""
        lookup = self.open(tokens, options)
        assert lookup is not None
        self.compute(self.next_id)
        self.close(self.next_id)
        return lookup

    def resize_text(self, seq_id: int, num_tokens: int) -> bool:
        text = self.texts[seq_id]
        possible = self.cache.can_resize(seq_id, num_tokens)
        try:
            self.cache.resize(seq_id, num_tokens)
        except CapacityError:
            assert not possible
            return False
        assert possible
        del text[num_tokens:]
        while len(text) < num_tokens:
            text.append(len(text) % 3)
        self.cache.verify()
        return True

    def close(self, seq_id: int) -> None:
        self.cache.close(seq_id)
        del self.texts[seq_id]
        self.cache.verify()

    def num_pages(self, group: int = 0) -> int:
        return len(self.windows.groups[group].pages)


def test_a_sequence_holds_what_its_next_token_reads_and_no_more() -> None:
    mill = Mill(40, WindowSpec(6, 20, chunk=ALL), WindowSpec(13, 20, chunk=ALL))
    mill.open(list(range(40)), CacheOptions(bypass=True))
    mill.compute(1)
    assert [index for index, page in enumerate(mill.cache.window_table(1, 0)) if page >= 0] == [8, 9]
    assert [index for index, page in enumerate(mill.cache.window_table(1, 1)) if page >= 0] == [7, 8, 9]
    assert (mill.num_pages(0), mill.num_pages(1)) == (2, 3), "a text that nobody can find keeps no more"
    mill.close(1)
    assert (mill.num_pages(0), mill.num_pages(1)) == (0, 0)


def test_a_window_group_is_smaller_than_the_cache() -> None:
    """Texts of 30 blocks in all, with 12 pages for the window: what is behind a window makes way."""
    mill = Mill(60, WindowSpec(8, 12, chunk=ALL))
    for first in (0, 100, 200):
        mill.run(list(range(first, first + 40)))
    assert mill.cache.stats().num_cached_blocks == 30
    assert mill.num_pages() == 12


def test_a_hit_shrinks_to_where_each_group_has_what_the_next_token_reads() -> None:
    mill = Mill(60, WindowSpec(8, 12, chunk=ALL))
    mill.run(list(range(40)))
    for block in mill.cache.shared.chain_of(OWN, array("i", range(40)))[4:6]:  # type: ignore[union-attr]
        mill.windows.groups[0].drop(block.block)
    lookup = mill.open([*range(22), 99, 98])
    assert lookup is not None
    assert lookup.num_hit == 16, "positions 16 .. 23 went, and 9 .. 15 are what token 16 reads"
    assert lookup.miss is not None
    assert (lookup.miss.reason, lookup.miss.position) == ("window not kept", 16)
    assert str(lookup.miss) == "window not kept"
    mill.compute(mill.next_id)
    full = mill.open(list(range(40)))
    assert full is not None
    assert full.num_hit == 39, "behind the gap all that is read is there"
    assert full.miss is None


def test_two_groups_agree_on_a_length() -> None:
    mill = Mill(60, WindowSpec(5, 30, chunk=ALL), WindowSpec(9, 30, chunk=ALL))
    mill.run(list(range(40)))
    blocks = [node.block for node in mill.shared.chain_of(OWN, array("i", range(40)))]
    mill.windows.groups[0].drop(blocks[8])
    mill.windows.groups[1].drop(blocks[6])
    assert mill.windows.longest(blocks, 39) == 24
    lookup = mill.open(list(range(40)))
    assert lookup is not None
    assert lookup.num_hit == 24
    mill.compute(mill.next_id)
    assert mill.run(list(range(40))).num_hit == 39, "what was computed again is kept again"


def test_nothing_kept_is_a_miss_of_all() -> None:
    mill = Mill(60, WindowSpec(8, 12, chunk=ALL))
    mill.run(list(range(40)))
    group = mill.windows.groups[0]
    for block in list(group.pages):
        group.drop(block)
    lookup = mill.run(list(range(40)))
    assert lookup.num_hit == 0
    assert lookup.miss is not None
    assert lookup.miss.reason == "window not kept"


def test_part_of_a_block_is_copied_in_every_group() -> None:
    mill = Mill(40, WindowSpec(3, 20, chunk=ALL), WindowSpec(11, 20, chunk=ALL))
    mill.run(list(range(23)))
    assert mill.run([*range(21), 77, 78, 79]).num_hit == 21


def test_a_rollback_beyond_what_the_window_keeps_computes_the_rest_again() -> None:
    mill = Mill(40, WindowSpec(7, 12, chunk=ALL))
    mill.open(list(range(40)), CacheOptions(bypass=True))
    mill.compute(1)
    assert mill.resize_text(1, 38)
    assert mill.cache.num_committed(1) == 38, "the page is still held"
    assert mill.resize_text(1, 30)
    assert mill.cache.num_committed(1) == 0, "nothing of what token 30 reads is left"
    mill.compute(1)
    mill.close(1)
    assert mill.num_pages() == 0


def test_pages_that_run_short_refuse_a_text_and_change_nothing() -> None:
    mill = Mill(40, WindowSpec(8, 6, chunk=ALL))
    assert mill.open(list(range(28))) is None
    assert mill.open(list(range(20))) is not None
    first = mill.next_id
    assert mill.open(list(range(100, 112))) is None
    assert not mill.resize_text(first, 28)
    mill.compute(first)
    assert mill.open(list(range(100, 112))) is not None, "what the first reads no more can go"


def test_pages_for_a_prompt_are_taken_chunk_by_chunk() -> None:
    mill = Mill(40, WindowSpec(8, 4, chunk=4))
    mill.open(list(range(100)), CacheOptions(bypass=True))
    assert mill.num_pages() == 0
    most = 0
    while mill.cache.num_committed(1) < 100:
        mill.compute(1, 4)
        most = max(most, mill.num_pages())
    assert most == 2, "what the next token reads"
    assert mill.resize_text(1, 130)
    mill.compute(1)


def test_what_one_may_come_to_hold_is_refused_to_others() -> None:
    mill = Mill(60, WindowSpec(8, 7, chunk=4))
    assert WindowSpec(8, 7, chunk=4).most_pages(SIZE) == 4
    assert mill.open(list(range(60))) is not None
    assert mill.open(list(range(100, 160))) is None
    assert mill.open(list(range(100, 112))) is not None, "three blocks hold three pages"
    last = mill.next_id
    assert not mill.resize_text(last, 13)
    mill.compute(1)
    assert mill.resize_text(last, 13), "behind its window the first needs no more than what is left of it"
    mill.compute(last)


def test_a_part_of_a_block_that_cannot_be_copied_is_not_hit_and_the_rest_as_far_as_pages_are_there() -> None:
    mill = Mill(60, WindowSpec(3, 4, chunk=2))
    mill.run(list(range(18)))
    blocks = [node.block for node in mill.shared.chain_of(OWN, array("i", range(18)))]
    mill.windows.groups[0].drop(blocks[3])
    assert mill.open(list(range(100, 112)), CacheOptions(bypass=True)) is not None
    lookup = mill.open([*range(18), 7, 7, 7, 7, 7, 7])
    assert lookup is not None
    assert lookup.num_hit == 12, "18 would take a page for the copy, and 16 reads what is not kept"
    mill.compute(mill.next_id)


def test_a_copy_that_waits_holds_the_page_that_it_reads() -> None:
    mill = Mill(60, WindowSpec(3, 5, chunk=2))
    mill.run(list(range(18)))
    assert mill.open([*range(17), 7, 7]) is not None
    group = mill.windows.groups[0]
    assert (group.num_reserved, group.num_available) == (2, 2)
    mill.move()
    assert group.num_available == 3
    mill.compute(mill.next_id)


def test_a_smaller_cache_moves_blocks_and_not_their_pages() -> None:
    mill = Mill(30, WindowSpec(8, 20, chunk=ALL))
    mill.run(list(range(1000, 1040)))
    mill.open(list(range(30)))
    mill.compute(1 + 1)
    mill.cache.shared.purge_tenant("default")  # type: ignore[union-attr]
    mill.move()
    moves = mill.cache.vacate(9)
    for copy in moves.copies:
        mill.stores[0][copy.target] = list(mill.stores[0][copy.source])
    mill.cache.moved(Moves(moves.wipes))
    mill.cache.relocate()
    mill.cache.set_num_blocks(9)
    mill.cache.verify()
    assert mill.resize_text(2, 33)
    mill.compute(2)


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
@pytest.mark.parametrize(
    "specs",
    [
        (WindowSpec(6, 12, chunk=ALL),),
        (WindowSpec(1, 10, chunk=ALL), WindowSpec(9, 14, chunk=ALL)),
        (WindowSpec(6, 8, chunk=3),),
        (WindowSpec(1, 9, chunk=7), WindowSpec(9, 11, chunk=7)),
    ],
    ids=["one", "two", "one, in chunks", "two, in chunks"],
)
def test_random_operations_never_read_what_is_not_there(policy: str, specs: tuple[WindowSpec, ...]) -> None:
    num_cut = num_hit = num_refused = 0
    for seed in range(16):
        draw = random.Random(seed)
        mill = Mill(draw.choice((16, 24)), *specs, policy=policy)
        earlier = [[1, 2, 3]]
        for _ in range(100):
            live, kind = list(mill.texts), draw.random()
            if kind < 0.3 or not live:
                base = draw.choice(earlier)
                tokens = base[: draw.randint(1, len(base))] + [draw.randint(1, 3) for _ in range(draw.randint(0, 9))]
                earlier = [*earlier[-8:], tokens]
                lookup = mill.open(tokens, CacheOptions(draw.choice("ab"), bypass=draw.random() < 0.1))
                num_refused += lookup is None
                num_hit += lookup is not None and lookup.num_hit > 0
                num_cut += lookup is not None and lookup.miss is not None and lookup.miss.reason == "window not kept"
            elif kind < 0.6:
                mill.compute(draw.choice(live), draw.choice((1, 5, ALL)))
            elif kind < 0.72:
                seq_id = draw.choice(live)
                mill.resize_text(seq_id, draw.randint(1, len(mill.texts[seq_id]) + 5))
            elif kind < 0.92:
                mill.close(draw.choice(live))
            elif kind < 0.95:
                mill.cache.publish_tail(draw.choice(live))
            elif kind < 0.98:
                with suppress(RequestError):  # nothing of it may be there
                    mill.shared.pin(CacheOptions("a"), array("i", draw.choice(earlier)[:8]), 1.0)
                mill.cache.advance(float(draw.randint(0, 1)) + mill.shared.now_s)
            else:
                mill.shared.purge_tenant(draw.choice("ab"))
            mill.cache.verify()
        for seq_id in list(mill.texts):
            mill.close(seq_id)
        mill.cache.advance(1e6)
        for tenant in "ab":
            mill.shared.purge_tenant(tenant)
        mill.move()
        assert all(not group.pages for group in mill.windows.groups)
        assert all(value is None for store in mill.stores for page in store for value in page), "wiped in every group"
    assert num_hit > 40
    assert num_refused > 10
    assert num_cut > 10


def test_a_rebuild_leaves_no_page() -> None:
    mill = Mill(30, WindowSpec(8, 20, chunk=ALL))
    mill.open(list(range(30)))
    mill.compute(1)
    mill.cache.rebuild()
    mill.texts.clear()
    mill.cache.verify()
    assert mill.num_pages() == 0
    assert mill.run(list(range(30))).num_hit == 0


def test_pages_beyond_what_was_reserved_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowSpec, "most_pages", lambda self, size: 1)
    with pytest.raises(IntegrityError, match="holds more pages of 6 than it may"):
        Mill(40, WindowSpec(6, 14, chunk=8)).run(list(range(30)))


@pytest.mark.parametrize("broken", ["drops_what_is_read", "hits_without_its_window", "forgets_to_copy"])
def test_a_broken_cache_is_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "drops_what_is_read":
        monkeypatch.setattr(WindowGroup, "first_read", lambda self, position: max(position - 1, 0) // self._size)
    elif broken == "hits_without_its_window":
        monkeypatch.setattr(Windows, "longest", lambda self, blocks, num_tokens: num_tokens)
    else:
        monkeypatch.setattr(WindowGroup, "moves", lambda self: Moves(tuple(self._pool.dirty), ()))
    with pytest.raises((AssertionError, IntegrityError, KeyError)):
        test_random_operations_never_read_what_is_not_there("lru", (WindowSpec(6, 12, chunk=ALL),))
