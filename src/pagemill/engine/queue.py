"""One tenant's waiting sequences in the order in which they would enter. Owns the order, not the decision."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import replace

from pagemill.engine.request import Sequence

PRIORITY_S = 10.0  # seconds of waiting that one unit of priority is worth
MOST_KEPT = 64  # places of sequences that are gone

# 0 where it ran before, 2 where it will be late, else 1; its rank or moment of urgency; its number. The sequence is
# never compared.
_Entry = tuple[int, float, int, Sequence]


class TenantQueue:
    """Waiting sequences of one tenant. Mutated by every method that is not a question.

    Those that ran before and gave way come first, in the order of their first entry; then the others by arrival, where
    a unit of priority counts as `PRIORITY_S` seconds of waiting. So a low priority is a long wait and no endless one.
    Last come those that cannot end by their deadlines any more, in the same order.

    One whose deadline passed while it waited is gone, but its place can be kept until its turn comes, without its text
    but with how much of that was in the cache: who stands within so many places of another, and whom the place itself
    passes, is then the same as without deadlines.
    """

    __slots__ = ("_entries", "_kept")

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._kept: list[_Entry] = []  # of them, in the same order

    def __len__(self) -> int:
        """Sequences that wait, without kept places."""
        return len(self._entries) - len(self._kept)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence where it belongs, in O(log n) and a move of memory."""
        entry = _entry(sequence)
        entries = self._entries
        if not entries or entries[-1] < entry:
            entries.append(entry)
        else:
            insort(entries, entry)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        _take(self._entries, _entry(sequence))

    def postpone(self, sequence: Sequence) -> None:
        """A waiting sequence will be late: it goes behind those that will not."""
        self.remove(sequence)
        sequence.is_late = True
        self.add(sequence)

    def would_keep(self, sequence: Sequence) -> bool:
        """True where `keep_place` would keep the place: not where MOST_KEPT are kept before it."""
        return len(self._kept) < MOST_KEPT or _entry(sequence) < self._kept[-1]

    def keep_place(self, sequence: Sequence, num_found: int) -> None:
        """Keep the place of a sequence that has just been taken out, in O(log n); of MOST_KEPT the last one goes.
        num_found: blocks of its text in the cache."""
        request = replace(sequence.request, prompt_token_ids=array("i"))
        place = Sequence(
            sequence.seq_id, request, sequence.choice, array("i"), sequence.marks, "finished",
            num_passed=sequence.num_passed, num_found=num_found,
        )  # fmt: skip
        self.add(place)
        insort(self._kept, _entry(place))
        if len(self._kept) > MOST_KEPT:
            self.drop_place(self._kept[-1][3])

    def drop_place(self, place: Sequence) -> None:
        """A kept place is no longer kept."""
        _take(self._kept, _entry(place))
        self.remove(place)

    def anew(self, waiting: Iterable[Sequence]) -> TenantQueue:
        """A queue of these sequences with the places that this one keeps, whatever state its order is in."""
        made = TenantQueue()
        made._kept = list(self._kept)
        made._entries = sorted([*map(_entry, waiting), *self._kept])
        return made

    def first(self, count: int) -> list[Sequence]:
        """Those of the first `count` places, or all; a finished one is a kept place."""
        return [entry[3] for entry in self._entries[:count]]


def _take(entries: list[_Entry], entry: _Entry) -> None:
    place = bisect_left(entries, entry)
    assert entries[place][3] is entry[3]
    del entries[place]


def _entry(sequence: Sequence) -> _Entry:
    if sequence.rank:
        return 0, float(sequence.rank), sequence.seq_id, sequence
    request = sequence.request
    return (
        2 if sequence.is_late else 1,
        request.arrival_s + PRIORITY_S * request.params.priority,
        sequence.seq_id,
        sequence,
    )
