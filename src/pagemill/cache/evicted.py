"""Which blocks left for want of room lately, so that a miss can be explained. Owns keys, tokens and times; bounded.

A block leaves before the one that it follows, so that what is remembered hangs together: the block before each is in
the tree or is remembered itself. That lets a purge find all that lay behind what it drops, gone as it may be.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice, repeat

from pagemill.cache.block import Node
from pagemill.cache.keys import TOKEN_BYTES


class _Fan:
    """Several remembered blocks behind one. Mutated by EvictedBlocks. keys: of all of them; latest: by first token, the
    key of the one that left last."""

    __slots__ = ("keys", "latest")

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.latest: dict[bytes, bytes] = {}


class EvictedBlocks:
    """The last `capacity` blocks that left, the earliest first. Mutated by `add`, `forget`, `forget_behind`, `resize`
    and `clear`."""

    __slots__ = ("_behind", "_blocks", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # By key: when it left, key of the block before it, its tokens. A dict would be slow to give its first entries.
        self._blocks: OrderedDict[bytes, tuple[float, bytes, bytes]] = OrderedDict()
        self._behind: dict[bytes, bytes | _Fan] = {}  # key of a block -> that of the one behind it, or of several

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def add(self, nodes: Sequence[Node], now_s: float) -> None:
        """Blocks have left, in order."""
        blocks, behind = self._blocks, self._behind
        keys = [node.key for node in nodes]
        parents = [node.parent.key for node in nodes if node.parent is not None]
        if not blocks.keys().isdisjoint(keys):
            for key in keys:
                blocks.pop(key, None)
        blocks.update(
            zip(keys, zip(repeat(now_s), parents, [node.tokens for node in nodes], strict=False), strict=True)
        )
        if behind.keys().isdisjoint(parents) and len(set(parents)) == len(parents):
            behind.update(zip(parents, keys, strict=True))
        else:
            for parent, key in zip(parents, keys, strict=True):
                if behind.setdefault(parent, key) is not key:
                    self._fan_out(parent, key)
        if len(blocks) > self.capacity:
            self._forget_earliest(len(blocks) - self.capacity)

    def _fan_out(self, parent: bytes, key: bytes) -> None:
        """Another block has left from behind one that has such a block already, or the same once more."""
        fan = self._behind[parent]
        if not isinstance(fan, _Fan):
            if fan == key:
                return
            other, fan = fan, _Fan()
            self._behind[parent] = fan
            fan.keys.add(other)
            fan.latest[self._blocks[other][2][:TOKEN_BYTES]] = other
        fan.keys.add(key)
        fan.latest[self._blocks[key][2][:TOKEN_BYTES]] = key

    def when(self, key: bytes) -> float | None:
        """When the block of this key left, None where it did not or is forgotten."""
        found = self._blocks.get(key)
        return None if found is None else found[0]

    def latest(self, parent: bytes, first_token: bytes) -> tuple[bytes, float] | None:
        """Tokens and time of the block that left last of those behind `parent` that begin with this token."""
        behind = self._behind.get(parent)
        key = behind.latest.get(first_token) if isinstance(behind, _Fan) else behind
        if key is None:
            return None
        when_s, _, tokens = self._blocks[key]
        return (tokens, when_s) if tokens.startswith(first_token) else None

    def behind(self, key: bytes) -> list[tuple[bytes, bytes]]:
        """Keys and tokens of the remembered blocks that came directly behind this one."""
        behind = self._behind.get(key, ())
        found = behind.keys if isinstance(behind, _Fan) else (behind,) if behind else ()
        return [(each, self._blocks[each][2]) for each in found]

    def forget_behind(self, key: bytes) -> None:
        """Remember nothing of the blocks that lay behind this one."""
        if key in self._behind:
            for each, _ in self.behind(key):
                self.forget(each)

    def forget(self, key: bytes) -> None:
        """Remember nothing of a block, nor of any that lay behind it."""
        stack = [key]
        while stack:
            each = stack.pop()
            stack += [child for child, _ in self.behind(each)]
            if each in self._blocks:
                self._remove(each)

    def _remove(self, key: bytes) -> None:
        _, parent, tokens = self._blocks.pop(key)
        behind = self._behind[parent]
        if isinstance(behind, _Fan):
            behind.keys.discard(key)
            if behind.latest.get(tokens[:TOKEN_BYTES]) == key:
                del behind.latest[tokens[:TOKEN_BYTES]]
            if behind.keys:
                return
        del self._behind[parent]

    def _forget_earliest(self, count: int) -> None:
        blocks, behind = self._blocks, self._behind
        for key in list(islice(blocks, count)):
            parent = blocks[key][1]
            if behind[parent] == key:
                del blocks[key], behind[parent]
            else:
                self._remove(key)

    def resize(self, capacity: int) -> None:
        """Remember so many at the most from now on."""
        self.capacity = capacity
        self._forget_earliest(len(self._blocks) - capacity if len(self._blocks) > capacity else 0)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._behind.clear()
