"""Pages of layers that read a window only. Owns which blocks have one, per group, and what a hit needs of them.

A block has its page of full attention for as long as it is in use. In a window group it has a page of its own, from
another pool, which goes earlier: a sequence holds those that its next token reads, and lets go of the others as it
moves on. What is let go of stays while the block can be found and room lasts; the least recently let go leaves first.
Pages for what is to be computed are taken step by step, out of what was reserved when the sequence entered or grew.

    blocks of a sequence    0   1   2   3   4   5 | next token
    full attention          x   x   x   x   x   x
    window of two blocks        .       x   x   x          x held, . kept for others, else dropped
    reserved                            x   x   x  (x)     as many as it can come to hold at a time

So a text can be hit up to a length n only where each group still has what token n reads: positions n - window + 1 on.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagemill.base.errors import IntegrityError
from pagemill.base.kv_spec import pages_in_reach
from pagemill.base.transfer import Copy, Moves
from pagemill.cache.pool import BlockPool

if TYPE_CHECKING:
    from pagemill.cache.sequences import SequenceBlocks


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """A KV group whose token p reads positions p - window + 1 .. p, and how many pages it has.

    chunk: most tokens of a sequence in a step.
    """

    window: int
    num_pages: int
    chunk: int

    def most_pages(self, size: int) -> int:
        """Pages that a sequence holds at a time, at most, in blocks of so many positions."""
        return pages_in_reach(self.window, self.chunk, size)


class WindowGroup:
    """Pages of one group by block. Mutated by every method that is not a question.

    pages: block -> page. Every page is held by sequences or idle, which only a block that can be found is.
    num_reserved: pages that sequences may come to hold, each counted for itself. num_wiped: pages overwritten.
    """

    __slots__ = (
        "_holders", "_idle", "_is_published", "_most", "_pool", "_size", "copies", "num_reserved", "num_wiped", "pages",
        "window",
    )  # fmt: skip

    def __init__(self, spec: WindowSpec, size: int, wipes: bool, is_published: Callable[[int], bool]) -> None:
        self.window = spec.window
        self.pages: dict[int, int] = {}
        self.copies: dict[int, tuple[Copy, int]] = {}  # by target page, with the block that is read
        self.num_reserved = self.num_wiped = 0
        self._size = size
        self._most = spec.most_pages(size)
        self._pool = BlockPool(spec.num_pages, wipes=wipes)
        self._holders: Counter[int] = Counter()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._is_published = is_published

    @property
    def num_available(self) -> int:
        """Pages that can be reserved now: of what is not, a copy that waits to be made holds its source."""
        return self._pool.num_blocks - self.num_reserved - len(self.copies)

    def to_reserve(self, num_blocks: int) -> int:
        """Pages that a sequence may come to hold which has so many blocks from the first that it reads."""
        return min(num_blocks, self._most)

    def first_read(self, position: int) -> int:
        """Index of the first block that the token at `position` reads."""
        return max(position - self.window + 1, 0) // self._size

    def longest(self, blocks: Sequence[int], num_tokens: int) -> int:
        """The largest number of tokens up to `num_tokens` after which the next one finds what it reads."""
        pages, most = self.pages, num_tokens
        while most > 0:
            read = range((most - 1) // self._size, self.first_read(most) - 1, -1)
            missing = next((index for index in read if blocks[index] not in pages), None)
            if missing is None:
                return most
            most = missing * self._size
        return 0

    def take(self, blocks: Iterable[int]) -> None:
        """A page for each block, held once. There must be as many available."""
        for block in blocks:
            assert block not in self.pages, f"block {block} has a page already"
            if not self._pool.num_free:
                self.drop(next(iter(self._idle)))
            [self.pages[block]] = self._pool.allocate(1)
            self._holders[block] = 1

    def hold(self, blocks: Iterable[int]) -> None:
        """One more reads these blocks."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def leave(self, blocks: Iterable[int]) -> None:
        """One less reads these blocks. A page that nobody reads stays while its block can be found."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._idle[block] = None
                if not self._is_published(block):
                    self.drop(block)

    def drop(self, block: int) -> None:
        """The block's contents go, if it has a page that nobody holds."""
        if block in self._idle:
            del self._idle[block]
            page = self.pages.pop(block)
            self._pool.release([page])
            if page in self.copies:
                self.leave([self.copies.pop(page)[1]])

    def exchange(self, own: int, there: int) -> None:
        """Who held `own` reads `there` from now on, a block of equal contents: whose page that has, it keeps, and else
        gets the one of `own`."""
        if there in self.pages:
            self.hold([there])
            self.leave([own])
        else:
            self.pages[there] = self.pages.pop(own)
            self._holders[there] = self._holders.pop(own)

    def copy(self, source: int, target: int, num_positions: int) -> None:
        """The page of block `target` begins with the first positions of that of `source`, which stays until then."""
        page = self.pages[target]
        self.hold([source])
        self.copies[page] = (Copy(self.pages[source], page, num_positions), source)

    def moves(self) -> Moves:
        """Wipes and copies of pages that come before the next step computes."""
        return Moves(tuple(self._pool.dirty), tuple(copy for copy, _ in self.copies.values()))

    def moved(self, moves: Moves) -> None:
        """These were made."""
        self.num_wiped += len(moves.wipes)
        for page in moves.wipes:
            self._pool.dirty.pop(page, None)
        for copy in moves.copies:
            if copy.target in self.copies and self.copies[copy.target][0] is copy:
                self.leave([self.copies.pop(copy.target)[1]])

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Blocks have new ids: old -> new."""
        self.pages = {moved.get(block, block): page for block, page in self.pages.items()}
        self._holders = Counter({moved.get(block, block): count for block, count in self._holders.items()})
        self._idle = OrderedDict((moved.get(block, block), None) for block in self._idle)
        self.copies = {page: (copy, moved.get(block, block)) for page, (copy, block) in self.copies.items()}

    def clear(self) -> None:
        """No block has a page."""
        self.pages, self.copies, self.num_reserved = {}, {}, 0
        self._holders.clear()
        self._idle.clear()
        self._pool.reset()

    def verify(self, held: Counter[int], num_reserved: int) -> None:
        """held: by block, how many sequences read it. Raises IntegrityError where pages are other than that."""
        self._pool.verify()
        if num_reserved != self.num_reserved or self.num_available < 0:
            raise IntegrityError(
                f"{self.num_reserved} of {self._pool.num_blocks} pages of a window of {self.window} are reserved, "
                f"beside {len(self.copies)} copies, and not {num_reserved}"
            )
        held = held + Counter(block for _, block in self.copies.values())
        if held != self._holders or len(set(self.pages.values())) != len(self.pages):
            raise IntegrityError(f"pages of a window of {self.window} are held {self._holders}, not {held}")
        idle = {block for block in self.pages if not held[block]}
        if idle != set(self._idle) or not all(map(self._is_published, idle)):
            raise IntegrityError(f"pages of a window of {self.window} are kept for blocks {idle} that cannot be found")
        if self._pool.num_free + len(self.pages) != self._pool.num_blocks:
            raise IntegrityError(f"a window of {self.window} lost pages")


class Windows:
    """The window groups of a cache, and what sequences hold in them. Mutates `first_read`, `num_paged` and `reserved`
    of sequences.

    Whoever enters, grows or goes back must find the pages for it: `left` and `fits` say so. What is taken then
    (`reach`) is there.
    """

    __slots__ = ("_size", "groups")

    def __init__(
        self, specs: Sequence[WindowSpec], size: int, wipes: bool, is_published: Callable[[int], bool]
    ) -> None:
        self.groups = [WindowGroup(spec, size, wipes, is_published) for spec in specs]
        self._size = size

    @classmethod
    def make(
        cls, specs: Sequence[WindowSpec], size: int, wipes: bool, is_published: Callable[[int], bool]
    ) -> Windows | None:
        """The groups of these specs; None where there are none."""
        return cls(specs, size, wipes, is_published) if specs else None

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Blocks have new ids: old -> new."""
        for group in self.groups:
            group.renumber(moved)

    def clear(self) -> None:
        """No block has a page."""
        for group in self.groups:
            group.clear()

    def longest(self, blocks: Sequence[int], num_tokens: int) -> int:
        """The largest number of tokens up to `num_tokens` that every group allows to be hit."""
        most = num_tokens
        while most > 0:
            least = min(group.longest(blocks, most) for group in self.groups)
            if least == most:
                return most
            most = least
        return 0

    def left(self, num_tokens: int, count: int, num_copies: int) -> int:
        """Pages that are left in every group once a sequence has entered that has computed `num_tokens` of its `count`
        blocks, some of it by copies; below 0 where it cannot."""
        return min(
            group.num_available - group.to_reserve(count - group.first_read(num_tokens)) - num_copies
            for group in self.groups
        )

    def fits(self, sequence: SequenceBlocks, num_tokens: int, count: int, num_copies: int = 0) -> bool:
        """True where a sequence may have `count` blocks, with `num_tokens` computed."""
        for group, reserved, before in zip(self.groups, sequence.reserved, sequence.first_read, strict=True):
            first = min(group.first_read(num_tokens), before)
            if group.to_reserve(count - first) - reserved + num_copies > group.num_available:
                return False
        return True

    def enter(self, sequence: SequenceBlocks, num_shared: int, tail: int | None, num_tail: int) -> None:
        """A sequence holds what its next token reads of its hits, and may take pages for its own blocks; the first of
        these begins with `num_tail` positions of block `tail`."""
        table = sequence.table
        sequence.first_read = [group.first_read(sequence.committed) for group in self.groups]
        sequence.reserved = [0] * len(self.groups)
        sequence.num_paged = num_shared
        for group, first in zip(self.groups, sequence.first_read, strict=True):
            group.hold(table[first:num_shared])
            if tail is not None:
                group.hold([tail])
        self._reserve(sequence, len(table))
        if tail is not None:
            self.reach(sequence, num_shared * self._size + num_tail)
            for group in self.groups:
                group.copy(tail, table[num_shared], num_tail)
                group.leave([tail])

    def grow(self, sequence: SequenceBlocks) -> None:
        """A sequence has taken more blocks."""
        self._reserve(sequence, len(sequence.table))

    def reach(self, sequence: SequenceBlocks, num_tokens: int) -> bool:
        """The sequence has pages for its first `num_tokens` positions, as far as it reads them. Returns whether it took
        any."""
        end = -(-num_tokens // self._size)
        if end <= sequence.num_paged:
            return False
        for group in self.groups:
            group.take(sequence.table[sequence.num_paged : end])
        sequence.num_paged = end
        return True

    def move_on(self, sequence: SequenceBlocks) -> bool:
        """The sequence has committed more: it lets go of what its next token does not read. Returns whether it did."""
        has_moved = False
        for index, group in enumerate(self.groups):
            before = sequence.first_read[index]
            first = group.first_read(sequence.committed)
            if first > before:
                sequence.first_read[index] = first
                group.leave(sequence.table[before:first])
                has_moved = True
        if has_moved:
            self._reserve(sequence, len(sequence.table))
        return has_moved

    def roll_back(self, sequence: SequenceBlocks, num_tokens: int, count: int) -> None:
        """The sequence goes back to `num_tokens` tokens, for which all that it reads is there, and `count` blocks."""
        for index, group in enumerate(self.groups):
            before = sequence.first_read[index]
            first = sequence.first_read[index] = min(group.first_read(num_tokens), before)
            group.hold(sequence.table[first : min(before, count)])
            group.leave(sequence.table[max(before, count) : sequence.num_paged])
        sequence.num_paged = min(sequence.num_paged, count)
        self._reserve(sequence, count)

    def _reserve(self, sequence: SequenceBlocks, count: int) -> None:
        """What a sequence of `count` blocks may come to hold."""
        for index, group in enumerate(self.groups):
            reserved = group.to_reserve(count - sequence.first_read[index])
            group.num_reserved += reserved - sequence.reserved[index]
            sequence.reserved[index] = reserved

    def exchange(self, own: int, there: int) -> None:
        """The sequence that wrote `own` reads `there` instead, a block of equal contents."""
        for group in self.groups:
            group.exchange(own, there)

    def copy_on_write(self, source: int, target: int, num_positions: int) -> None:
        """A sequence that held `source` goes on in `target`, which begins like it."""
        for group in self.groups:
            group.take([target])
            group.copy(source, target, num_positions)
            group.leave([source])

    def drop(self, block: int) -> None:
        """A block can no longer be found."""
        for group in self.groups:
            group.drop(block)

    def moves(self) -> tuple[Moves, ...]:
        """Wipes and copies of pages of every group that come before the next step computes; empty where there are
        none."""
        found = tuple(group.moves() for group in self.groups)
        return found if any(found) else ()

    def moved(self, moves: Sequence[Moves]) -> None:
        """These were made."""
        for group, each in zip(self.groups, moves, strict=bool(moves)):
            group.moved(each)

    def verify(self, sequences: Sequence[SequenceBlocks]) -> None:
        """Pages are held as sequences read. Raises IntegrityError."""
        for index, group in enumerate(self.groups):
            held: Counter[int] = Counter()
            for sequence in sequences:
                first = sequence.first_read[index]
                held.update(sequence.table[first : sequence.num_paged])
                if first > group.first_read(sequence.committed) or sequence.num_paged * self._size < sequence.committed:
                    raise IntegrityError(f"a sequence lost what it reads in a window of {group.window}: {sequence}")
                if sequence.num_paged - first > sequence.reserved[index]:
                    raise IntegrityError(f"a sequence holds more pages of {group.window} than it may: {sequence}")
            group.verify(held, sum(sequence.reserved[index] for sequence in sequences))

    def table(self, sequence: SequenceBlocks, index: int) -> array[int]:
        """Pages of a sequence's blocks in a group, in order; -1 for those that it reads no more, or has not reached."""
        pages, first, end = self.groups[index].pages, sequence.first_read[index], sequence.num_paged
        table = array("i", [-1]) * len(sequence.table)
        table[first:end] = array("i", [pages[block] for block in sequence.table[first:end]])
        return table
