"""Which blocks left for want of room lately, so that a miss can be explained. Owns their order and links; bounded.

    alive ── alive ── left 3 s ago ── left 3 s ago
                  └── left 1 s ago

What left stays linked behind the block that it followed (`Node.gone`), alive or gone itself: a miss is asked for at the
end of what is there, so that no look-up by key is needed. A block leaves before the one that it follows, and so is
forgotten before it. That lets a purge find all that lay behind what it drops, gone as it may be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pagemill.cache.block import GoneNodes, Node
from pagemill.cache.keys import TOKEN_BYTES

_SLACK = 64


class EvictedBlocks:
    """The last `capacity` blocks that left, the earliest first. Mutated by every method that is not a question."""

    __slots__ = ("_num", "_order", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._order: deque[Node] = deque()  # with some that are forgotten or back by now, which hold nothing
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, nodes: Sequence[Node], now_s: float) -> None:
        """Blocks have left the tree, in order."""
        for node in nodes:
            parent = node.parent
            assert parent is not None
            node.left_s = now_s
            if parent.gone is None:
                parent.gone = node
            else:
                self._fan_out(parent, node)
        self._order.extend(nodes)
        self._num += len(nodes)
        if self._num > self.capacity:
            self._forget_earliest()

    def _fan_out(self, parent: Node, node: Node) -> None:
        """Another block has left from behind one that such a block is remembered of."""
        gone = parent.gone
        if isinstance(gone, Node):
            other, gone = gone, GoneNodes()
            parent.gone = gone
            gone.by_tokens[other.tokens] = gone.latest[other.tokens[:TOKEN_BYTES]] = other
        assert gone is not None
        gone.by_tokens[node.tokens] = gone.latest[node.tokens[:TOKEN_BYTES]] = node

    def came_back(self, nodes: Sequence[Node]) -> None:
        """A run of blocks is published: what is remembered of the same ones is no more, and what lay behind these lies
        behind the new ones. O(nodes)."""
        for node in nodes:
            parent = node.parent
            assert parent is not None
            left = self.find(parent, node.tokens)
            if left is None:  # nor anything behind it
                return
            if isinstance(left.gone, Node):
                left.gone.parent = node
            node.gone = left.gone  # several know each other by what they have in common, whoever they name as parent
            self._remove(left)
        self._tidy()

    def find(self, parent: Node, tokens: bytes) -> Node | None:
        """The remembered block with these tokens that left from behind `parent`."""
        gone = parent.gone
        if isinstance(gone, Node):
            return gone if gone.tokens == tokens else None
        return None if gone is None else gone.by_tokens.get(tokens)

    def latest(self, parent: Node, first_token: bytes) -> Node | None:
        """Of the blocks that left from behind `parent` and begin with this token, the one that left last."""
        gone = parent.gone
        if isinstance(gone, Node):
            return gone if gone.tokens.startswith(first_token) else None
        return None if gone is None else gone.latest.get(first_token)

    def behind(self, node: Node) -> list[Node]:
        """The remembered blocks that came directly behind this one."""
        gone = node.gone
        return [gone] if isinstance(gone, Node) else [] if gone is None else list(gone.by_tokens.values())

    def forget_behind(self, node: Node) -> None:
        """Remember nothing of the blocks that lay behind this one."""
        if node.gone is not None:
            stack = self.behind(node)
            while stack:
                each = stack.pop()
                stack += self.behind(each)
                self._remove(each)
            self._tidy()

    def forget(self, node: Node) -> None:
        """Remember nothing of a block, nor of any that lay behind it."""
        self.forget_behind(node)
        if node.left_s is not None:
            self._remove(node)
            self._tidy()

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        gone = parent.gone
        if isinstance(gone, GoneNodes):
            del gone.by_tokens[node.tokens]
            if gone.latest.get(node.tokens[:TOKEN_BYTES]) is node:
                del gone.latest[node.tokens[:TOKEN_BYTES]]
        else:
            parent.gone = None

    def _remove(self, node: Node) -> None:
        """Forget one block that nothing is remembered behind, or whose followers have another parent; what stays of it
        in the order holds no text."""
        self._unlink(node)
        node.key = node.tokens = b""
        node.left_s = node.parent = None
        self._num -= 1

    def _forget_earliest(self) -> None:
        take = self._order.popleft
        for _ in range(self._num - self.capacity):
            node = take()
            while node.left_s is None:
                node = take()
            self._unlink(node)
        self._num = min(self._num, self.capacity)

    def _tidy(self) -> None:
        if len(self._order) > 2 * self._num + _SLACK:
            self._order = deque(node for node in self._order if node.left_s is not None)

    def resize(self, capacity: int) -> None:
        """Remember so many at the most from now on."""
        self.capacity = capacity
        self._forget_earliest()

    def clear(self) -> None:
        """Forget everything, in whatever state it is."""
        for node in self._order:
            gone = None if node.parent is None else node.parent.gone
            if isinstance(gone, GoneNodes):
                gone.by_tokens.clear()
                gone.latest.clear()
            elif node.parent is not None:
                node.parent.gone = None
            node.key = node.tokens = b""
            node.left_s = node.parent = None
        self._order.clear()
        self._num = 0
