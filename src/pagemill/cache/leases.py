"""Pins: blocks that may not be evicted until a time. Owns leases and their ends; holding the blocks is the caller's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from heapq import heappop, heappush


@dataclass(frozen=True, slots=True)
class Lease:
    """A pin. blocks: held until it ends. account: index of whose it is. expires_s: on the cache's clock."""

    lease_id: int
    blocks: tuple[int, ...]
    account: int
    num_tokens: int
    expires_s: float


class Leases:
    """Leases that have not ended. Mutated by `add`, `remove` and `ended`. num_forced: those ended by a purge."""

    __slots__ = ("_ends", "_holders", "_leases", "_next_id", "num_forced", "num_references")

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._ends: list[tuple[float, int]] = []
        self._holders: Counter[int] = Counter()
        self._next_id = 0
        self.num_references = 0
        self.num_forced = 0

    @property
    def num_blocks(self) -> int:
        """Blocks under at least one lease."""
        return len(self._holders)

    def num_fresh(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are under no lease."""
        return sum(1 for block in blocks if block not in self._holders)

    def num_of(self, block: int) -> int:
        """Leases that hold a block."""
        return self._holders[block]

    def ends_at(self, block: int, num_tokens: int) -> bool:
        """Whether a lease of fewer than so many tokens ends with this block."""
        if block not in self._holders:
            return False
        return any(each.blocks[-1] == block and each.num_tokens < num_tokens for each in self.of({block}))

    def held_blocks(self) -> list[int]:
        """One entry for each lease of each block."""
        return list(self._holders.elements())

    def add(self, blocks: Iterable[int], account: int, num_tokens: int, expires_s: float) -> Lease:
        """A new lease."""
        self._next_id += 1
        lease = Lease(self._next_id, tuple(blocks), account, num_tokens, expires_s)
        self._leases[lease.lease_id] = lease
        heappush(self._ends, (expires_s, lease.lease_id))
        self._holders.update(lease.blocks)
        self.num_references += len(lease.blocks)
        return lease

    def remove(self, lease_id: int) -> Lease | None:
        """End a lease; None where there is none of that id."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            for block in lease.blocks:
                self._holders[block] -= 1
                if not self._holders[block]:
                    del self._holders[block]
            self.num_references -= len(lease.blocks)
            if len(self._ends) > 2 * len(self._leases) + 64:
                self._ends = sorted((each.expires_s, each.lease_id) for each in self._leases.values())
        return lease

    def ended(self, now_s: float) -> list[Lease]:
        """Leases whose time is over, still to be removed."""
        found = []
        while self._ends and self._ends[0][0] <= now_s:
            lease = self._leases.get(heappop(self._ends)[1])
            if lease is not None:
                found.append(lease)
        return found

    def clear(self) -> None:
        """Every lease has ended, by force."""
        self.num_forced += len(self._leases)
        self._leases, self._ends, self.num_references = {}, [], 0
        self._holders.clear()

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Blocks have new ids: old -> new."""
        for lease_id, lease in self._leases.items():
            self._leases[lease_id] = replace(lease, blocks=tuple(moved.get(block, block) for block in lease.blocks))
        self._holders = Counter(block for lease in self._leases.values() for block in lease.blocks)

    def of(self, blocks: Set[int]) -> list[Lease]:
        """Leases that hold any of the blocks."""
        return [lease for lease in self._leases.values() if not blocks.isdisjoint(lease.blocks)]
