"""Pages of layers that read a window only. Owns which blocks have one, per group, and what a hit needs of them.

A block has its page of full attention for as long as it is in use. In a window group it has a page of its own, from
another pool, which goes earlier: a sequence holds those that its next token reads, and lets go of the others as it
moves on. What is let go of stays while the block can be found and room lasts; the least recently let go leaves first.

    blocks of a sequence    0   1   2   3   4   5 | next token
    full attention          x   x   x   x   x   x
    window of two blocks        .       x   x   x          x held, . kept for others, else dropped

So a text can be hit up to a length n only where each group still has what token n reads: positions n - window + 1 on.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagemill.base.errors import IntegrityError
from pagemill.base.transfer import Copy, Moves
from pagemill.cache.pool import BlockPool

if TYPE_CHECKING:
    from pagemill.cache.sequences import SequenceBlocks


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """A KV group whose token p reads positions p - window + 1 .. p, and how many pages it has."""

    window: int
    num_pages: int


class WindowGroup:
    """Pages of one group by block. Mutated by every method that is not a question.

    pages: block -> page. Every page is held by sequences or idle, which only a block that can be found is.
    """

    __slots__ = ("_holders", "_idle", "_is_published", "_pool", "_size", "copies", "pages", "window")

    def __init__(self, spec: WindowSpec, size: int, wipes: bool, is_published: Callable[[int], bool]) -> None:
        self.window = spec.window
        self.pages: dict[int, int] = {}
        self.copies: dict[int, tuple[Copy, int]] = {}  # by target page, with the block that is read
        self._size = size
        self._pool = BlockPool(spec.num_pages, wipes=wipes)
        self._holders: Counter[int] = Counter()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._is_published = is_published

    @property
    def num_available(self) -> int:
        """Pages that can be taken now."""
        return self._pool.num_free + len(self._idle)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks have a page that nobody holds."""
        return sum(1 for block in blocks if block in self._idle)

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
        for page in moves.wipes:
            self._pool.dirty.pop(page, None)
        for copy in moves.copies:
            if copy.target in self.copies:
                self.leave([self.copies.pop(copy.target)[1]])

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Blocks have new ids: old -> new."""
        self.pages = {moved.get(block, block): page for block, page in self.pages.items()}
        self._holders = Counter({moved.get(block, block): count for block, count in self._holders.items()})
        self._idle = OrderedDict((moved.get(block, block), None) for block in self._idle)
        self.copies = {page: (copy, moved.get(block, block)) for page, (copy, block) in self.copies.items()}

    def clear(self) -> None:
        """No block has a page."""
        self.pages, self.copies = {}, {}
        self._holders.clear()
        self._idle.clear()
        self._pool.reset()

    def verify(self, held: Counter[int]) -> None:
        """held: by block, how many sequences read it. Raises IntegrityError where pages are other than that."""
        self._pool.verify()
        held = held + Counter(block for _, block in self.copies.values())
        if held != self._holders or len(set(self.pages.values())) != len(self.pages):
            raise IntegrityError(f"pages of a window of {self.window} are held {self._holders}, not {held}")
        idle = {block for block in self.pages if not held[block]}
        if idle != set(self._idle) or not all(map(self._is_published, idle)):
            raise IntegrityError(f"pages of a window of {self.window} are kept for blocks {idle} that cannot be found")
        if self._pool.num_free + len(self.pages) != self._pool.num_blocks:
            raise IntegrityError(f"a window of {self.window} lost pages")


class Windows:
    """The window groups of a cache, and what sequences hold in them. Mutates the `first_read` of sequences.

    Every method that takes pages must find them available: `num_available` says how many blocks' worth there are.
    """

    __slots__ = ("groups",)

    def __init__(
        self, specs: Sequence[WindowSpec], size: int, wipes: bool, is_published: Callable[[int], bool]
    ) -> None:
        self.groups = [WindowGroup(spec, size, wipes, is_published) for spec in specs]

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

    def num_available(self, hits: Sequence[int] = ()) -> int:
        """Blocks that pages can be taken for in every group, once these hits are held."""
        return min(group.num_available - group.num_idle(hits) for group in self.groups)

    def enter(self, sequence: SequenceBlocks, num_shared: int, tail: int | None, num_tail: int) -> None:
        """A sequence holds what its next token reads of its hits, and has pages for its own blocks; the first of these
        begins with `num_tail` positions of block `tail`."""
        table = sequence.table
        sequence.first_read = [group.first_read(sequence.committed) for group in self.groups]
        for group, first in zip(self.groups, sequence.first_read, strict=True):
            group.hold(table[first:num_shared])
            if tail is not None:
                group.hold([tail])
            group.take(table[num_shared:])
            if tail is not None:
                group.copy(tail, table[num_shared], num_tail)
                group.leave([tail])

    def grow(self, blocks: Sequence[int]) -> None:
        """A sequence has taken these blocks."""
        for group in self.groups:
            group.take(blocks)

    def move_on(self, sequence: SequenceBlocks) -> None:
        """The sequence has committed more: it lets go of what its next token does not read."""
        for index, group in enumerate(self.groups):
            before = sequence.first_read[index]
            first = sequence.first_read[index] = max(group.first_read(sequence.committed), before)
            group.leave(sequence.table[before:first])

    def roll_back(self, sequence: SequenceBlocks, num_tokens: int, count: int) -> None:
        """The sequence goes back to `num_tokens` tokens, for which all that it reads is there, and `count` blocks."""
        for index, group in enumerate(self.groups):
            before = sequence.first_read[index]
            first = sequence.first_read[index] = min(group.first_read(num_tokens), before)
            group.hold(sequence.table[first : min(before, count)])
            group.leave(sequence.table[max(before, count) :])

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

    def verify(self, sequences: Sequence[SequenceBlocks]) -> None:
        """Pages are held as sequences read. Raises IntegrityError."""
        for index, group in enumerate(self.groups):
            held: Counter[int] = Counter()
            for sequence in sequences:
                first = sequence.first_read[index]
                held.update(sequence.table[first:])
                if first > group.first_read(sequence.committed):
                    raise IntegrityError(f"a sequence lost what it reads in a window of {group.window}: {sequence}")
            group.verify(held)

    def table(self, sequence: SequenceBlocks, index: int) -> array[int]:
        """Pages of a sequence's blocks in a group, in order; -1 for those that it reads no more."""
        pages, first = self.groups[index].pages, sequence.first_read[index]
        return array("i", (-1 if i < first else pages[block] for i, block in enumerate(sequence.table)))
