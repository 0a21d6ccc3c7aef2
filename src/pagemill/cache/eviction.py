"""Which cached block goes next: priorities above policies, a set of orders for each tenant that has a quota.

Owns the shelves, one policy for each (partition, priority), and when a priority ends. What may not go is locked here by
the manager: blocks in use, under a lease, or with published blocks behind them, so that chains leave from their end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from pagemill.cache.block import DEFAULT_PRIORITY, Node
from pagemill.cache.policies.base import BlockInfo, Policy
from pagemill.cache.policies.registry import POLICIES, Makers, make_policy

# What attention adds to the work of a token for each position before it, by multiplications in the default model:
# 30 layers x 9 heads x 64 x 2 = 34,560, to 106 million of its matrices.
_COST_PER_POSITION = 3.3e-4
_MOST_INFOS = 4096
FIRST_SPARE_HANDLE = 1 << 40  # beyond every block


def recompute_cost(position: int) -> float:
    """Time to compute a block that begins at this position, relative to one at the start of a text, in steps of an
    eighth: attention reads what lies before it."""
    return 1.0 + int(position * _COST_PER_POSITION * 8) / 8


class Shelves:
    """Policies by partition and priority. Mutated by every method.

    policy: name of the policy of each shelf. capacity: blocks of the whole cache. page_bytes: of one block. makers: of
    the policies.
    """

    __slots__ = (
        "_capacity", "_expiries", "_infos", "_levels", "_makers", "_moved", "_num_infos", "_num_set", "_page_bytes",
        "_policies", "policy",
    )  # fmt: skip

    def __init__(self, policy: str, capacity: int, page_bytes: int = 1, makers: Makers = POLICIES) -> None:
        self.policy = policy
        self._capacity = capacity
        self._page_bytes = page_bytes
        self._makers = makers
        self._policies: dict[tuple[int, int], Policy] = {}
        self._levels: dict[int, list[int]] = {}
        self._expiries: list[tuple[float, int, Node]] = []
        self._num_set = 0
        # By tokens, priority, account and text, then by depth.
        self._infos: dict[tuple[int, int, int, tuple[int, int]], dict[int, BlockInfo]] = {}
        self._num_infos = 0
        self._moved: dict[int, Node] = {}  # by handle, nodes whose block is another by now
        self._shelf(0, DEFAULT_PRIORITY)

    def insert(
        self, node: Node, partition: int, num_tokens: int, *, locked: bool, text: tuple[int, int] = (0, 0)
    ) -> None:
        """A block has been published. text: length in tokens of the text that it came in with, and how many blocks of
        that were found; 0 where it is not told."""
        shelf = node.shelf = self._shelf(partition, node.priority)
        [info] = self._infos_of([node], num_tokens, text)
        shelf.insert(self._handle(node), node.key, info)
        if locked:
            shelf.lock(node.handle)

    def insert_run(
        self, nodes: Sequence[Node], keys: Sequence[bytes], partition: int, num_tokens: int, text: tuple[int, int]
    ) -> None:
        """Blocks that are in use have been published one behind the other, of one account and priority. keys: of each.
        num_tokens: in each; text: as for `insert`."""
        shelf = self._shelf(partition, nodes[0].priority)
        for node in nodes:
            node.shelf = shelf
        handles = [node.block for node in nodes] if not self._moved else list(map(self._handle, nodes))
        shelf.admit(handles, keys, self._infos_of(nodes, num_tokens, text))

    def _handle(self, node: Node) -> int:
        handle = node.handle = node.block
        if self._moved and handle in self._moved:  # a node that was moved away goes by this number
            self._num_set += 1
            handle = node.handle = FIRST_SPARE_HANDLE + self._num_set
            self._moved[handle] = node
        return handle

    def _infos_of(self, nodes: Sequence[Node], num_tokens: int, text: tuple[int, int]) -> list[BlockInfo]:
        """What a policy is told of a run of blocks of one account and priority; the latest are kept, as the blocks of a
        text have much in common."""
        name = (num_tokens, nodes[0].priority, nodes[0].account, text)
        depths = range(nodes[0].depth, nodes[0].depth + len(nodes))
        made = self._infos.get(name)
        if made is None:
            made = self._infos[name] = {}
        try:
            return [made[depth] for depth in depths]
        except KeyError:
            pass
        if self._num_infos >= _MOST_INFOS:
            made, self._num_infos = {}, 0
            self._infos = {name: made}
        missing = [depth for depth in depths if depth not in made]
        self._num_infos += len(missing)
        for depth in missing:
            made[depth] = self._info(depth, name)
        return [made[depth] for depth in depths]

    def _info(self, depth: int, name: tuple[int, int, int, tuple[int, int]]) -> BlockInfo:
        num_tokens, priority, account, (text_tokens, num_known_blocks) = name
        return BlockInfo(
            num_tokens=num_tokens,
            depth=depth,
            num_bytes=self._page_bytes,
            recompute_cost=recompute_cost(depth * num_tokens),
            priority=priority,
            namespace=account,
            text_tokens=text_tokens,
            num_known_blocks=num_known_blocks,
        )

    def lock(self, node: Node) -> None:
        """The block has a first reason to stay."""
        assert node.shelf is not None
        node.shelf.lock(node.handle)

    def unlock(self, node: Node) -> None:
        """The block has no reason to stay any more."""
        assert node.shelf is not None
        node.shelf.unlock(node.handle)

    def touch_chain(self, nodes: list[Node]) -> None:
        """A text is used: its blocks from the first to the last, which count as used from the last to the first."""
        shelf, handles = None, []
        for node in reversed(nodes):
            if node.shelf is not shelf and shelf is not None:
                shelf.touch_all(handles)
                handles = []
            shelf = node.shelf
            handles.append(node.handle)
        if shelf is not None:
            shelf.touch_all(handles)

    def renumber(self, node: Node, block: int) -> None:
        """The node's contents are in another block. Policies know it by its handle, so that it keeps its place."""
        node.block = block
        self._moved[node.handle] = node

    def move(self, node: Node, partition: int, num_tokens: int, *, locked: bool) -> None:
        """The block's priority or partition has changed."""
        assert node.shelf is not None
        node.shelf.remove(node.handle, False)
        if self._moved:
            self._moved.pop(node.handle, None)
        self.insert(node, partition, num_tokens, locked=locked)

    def remove(self, node: Node, *, evicted: bool) -> None:
        """The block's contents go."""
        assert node.shelf is not None
        node.shelf.remove(node.handle, evicted)
        node.shelf = None
        if self._moved:
            self._moved.pop(node.handle, None)

    def on_misses(self, keys: list[bytes], partition: int) -> None:
        """A text asked for these blocks and they are not there."""
        on_miss = self._shelf(partition, DEFAULT_PRIORITY).on_miss
        for key in keys:
            on_miss(key)

    def drop(self, partition: int) -> None:
        """A partition has no blocks any more and goes, with what its policies remember."""
        for level in self._levels.pop(partition, ()):
            del self._policies[partition, level]

    def resize(self, capacity: int) -> None:
        """The cache has so many blocks from now on."""
        self._capacity = capacity
        for policy in self._policies.values():
            policy.resize(capacity)

    def victim(self, partitions: Iterable[int]) -> int | None:
        """The next block to evict: of the lowest priority, and among equals of the partition named first."""
        found = self._first(partitions)
        if found is None:
            return None
        node = self._moved.get(found[1])
        return found[1] if node is None else node.block

    def _first(self, partitions: Iterable[int]) -> tuple[Policy, int] | None:
        """The policy that `victim` comes from, and how it knows the block."""
        best, lowest = None, 101
        for partition in partitions:
            for level in self._levels.get(partition, ()):
                if level >= lowest:
                    break
                policy = self._policies[partition, level]
                handle = policy.victim()
                if handle is not None:
                    best, lowest = (policy, handle), level
                    break
        return best

    def evict_run(self, nodes: Sequence[Node]) -> int:
        """The node of the victim and nodes that it keeps locked leave their order: `Policy.evict_run`, all on one
        shelf. Returns how many have left; the caller clears their `shelf`."""
        shelf, moved = nodes[0].shelf, self._moved
        assert shelf is not None
        handles = [node.handle for node in nodes]
        count = shelf.evict_run(handles)
        for handle in handles[:count] if moved else ():
            moved.pop(handle, None)
        return count

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

    def forget_dead(self) -> None:
        """Nodes that can no longer be found are not kept for the end of their priority. O(nodes with such an end)."""
        if any(each[2].shelf is None for each in self._expiries):
            self._expiries = [each for each in self._expiries if each[2].shelf is not None]
            heapify(self._expiries)

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
            policy = self._policies[name] = make_policy(self.policy, self._capacity, self._makers)
            insort(self._levels.setdefault(partition, []), priority)
        return policy
