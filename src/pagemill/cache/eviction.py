"""Which cached block goes next: priorities above policies, a set of orders for each tenant that has a quota.

Owns the shelves, one policy for each (partition, priority), and when a priority ends. What may not go is locked here by
the manager: blocks in use, under a lease, or with published blocks behind them, so that chains leave from their end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from pagemill.cache.block import DEFAULT_PRIORITY, Node
from pagemill.cache.policies.base import BlockInfo, Policy
from pagemill.cache.policies.registry import make_policy


class Shelves:
    """Policies by partition and priority. Mutated by every method.

    policy: name of the policy of each shelf. capacity: blocks of the whole cache. page_bytes: of one block.
    """

    __slots__ = ("_capacity", "_expiries", "_levels", "_num_set", "_page_bytes", "_policies", "policy")

    def __init__(self, policy: str, capacity: int, page_bytes: int = 1) -> None:
        self.policy = policy
        self._capacity = capacity
        self._page_bytes = page_bytes
        self._policies: dict[tuple[int, int], Policy] = {}
        self._levels: dict[int, list[int]] = {}
        self._expiries: list[tuple[float, int, Node]] = []
        self._num_set = 0
        self._shelf(0, DEFAULT_PRIORITY)

    def insert(self, node: Node, partition: int, num_tokens: int, *, locked: bool) -> None:
        """A block has been published."""
        parent = node.parent
        assert parent is not None
        depth = node.depth
        info = BlockInfo(
            num_tokens=num_tokens,
            depth=depth,
            num_bytes=self._page_bytes,
            recompute_cost=1.0 + depth * 0.002,
            priority=node.priority,
            namespace=node.account,
            parent=None if depth == 0 else parent.key,
        )
        shelf = node.shelf = self._shelf(partition, node.priority)
        shelf.insert(node.block, node.key, info)
        if locked:
            shelf.lock(node.block)

    def move(self, node: Node, partition: int, num_tokens: int, *, locked: bool) -> None:
        """The block's priority or partition has changed."""
        assert node.shelf is not None
        node.shelf.remove(node.block, False)
        self.insert(node, partition, num_tokens, locked=locked)

    def remove(self, node: Node, *, evicted: bool) -> None:
        """The block's contents go."""
        assert node.shelf is not None
        node.shelf.remove(node.block, evicted)
        node.shelf = None

    def on_miss(self, key: bytes, partition: int) -> None:
        """A text asked for this block and it is not there."""
        self._shelf(partition, DEFAULT_PRIORITY).on_miss(key)

    def victim(self, partitions: Iterable[int]) -> int | None:
        """The next block to evict: of the lowest priority, and among equals of the partition named first."""
        best, lowest = None, 101
        for partition in partitions:
            for level in self._levels.get(partition, ()):
                if level >= lowest:
                    break
                block = self._policies[partition, level].victim()
                if block is not None:
                    best, lowest = block, level
                    break
        return best

    def expire_at(self, node: Node, when_s: float | None) -> None:
        """Remember when the node's priority ends; None: it does not."""
        if node.expires_s == when_s:
            return
        node.expires_s = when_s
        if when_s is None:
            return
        self._num_set += 1
        heappush(self._expiries, (when_s, self._num_set, node))
        if len(self._expiries) > 2 * self._capacity + 64:  # most are of the past: keep those that still hold
            live = [each for each in self._expiries if each[2].expires_s == each[0] and each[2].shelf is not None]
            heapify(live)
            self._expiries = live

    def expired(self, now_s: float) -> list[Node]:
        """Published nodes whose priority has ended, each once."""
        found = []
        while self._expiries and self._expiries[0][0] <= now_s:
            when_s, _, node = heappop(self._expiries)
            if node.expires_s == when_s and node.shelf is not None:
                node.expires_s = None
                found.append(node)
        return found

    def _shelf(self, partition: int, priority: int) -> Policy:
        name = (partition, priority)
        policy = self._policies.get(name)
        if policy is None:
            policy = self._policies[name] = make_policy(self.policy, self._capacity)
            insort(self._levels.setdefault(partition, []), priority)
        return policy
