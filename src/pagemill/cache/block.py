"""A published block as the tree of prefixes knows it. Owns the node, not its place in a pool or in an order."""

from __future__ import annotations

from pagemill.cache.policies.base import Policy

DEFAULT_PRIORITY = 50


class GoneNodes:
    """Several blocks that left from behind one. Mutated by EvictedBlocks. latest: by first token, the one that left
    last unless that is forgotten."""

    __slots__ = ("by_tokens", "latest")

    def __init__(self) -> None:
        self.by_tokens: dict[bytes, Node] = {}
        self.latest: dict[bytes, Node] = {}


class Node:
    """A block with known tokens, or the root of a namespace (block -1). Mutated by PrefixTree and the manager.

    key: its content key. tokens: packed, 4 bytes each; fewer than a block's for the tail of a text. below: the node
    behind it, or several by their tokens, None without any: `children` for those who read. order: the tokens of these,
    sorted, so that the longest common beginning is next to where a text would stand; None until the tree has looked for
    one.
    depth: index in its chain, -1 for a root. account: whose blocks it counts among. priority: 0 to 100; expires_s: when
    that ends, on the cache's clock, None for never. shelf: the policy that it stands in, as `handle`: its block, or the
    block that it had before a smaller size moved it. alive: False once it is taken
    out of the tree; whoever still holds the block may read it, and nothing is published behind it. num_sequences: of a
    root, how many are open below it. gone: what left from directly behind it and is remembered; left_s: when it left
    itself, None unless that is remembered.
    """

    __slots__ = (
        "account", "alive", "below", "block", "depth", "expires_s", "gone", "handle", "key", "left_s",
        "num_sequences", "order", "parent", "priority", "shelf", "tokens",
    )  # fmt: skip

    def __init__(self, block: int, key: bytes, tokens: bytes, parent: Node | None, depth: int) -> None:
        self.block = self.handle = block
        self.key = key
        self.tokens = tokens
        self.parent = parent
        self.depth = depth
        self.below: Node | dict[bytes, Node] | None = None
        self.order: list[bytes] | None = None
        self.account = self.num_sequences = 0
        self.priority = DEFAULT_PRIORITY
        self.expires_s: float | None = None
        self.shelf: Policy | None = None
        self.gone: Node | GoneNodes | None = None
        self.left_s: float | None = None
        self.alive = True

    @property
    def children(self) -> dict[bytes, Node]:
        """The nodes directly behind it by their tokens: to be read, not written."""
        below = self.below
        if isinstance(below, dict):
            return below
        return {} if below is None else {below.tokens: below}

    def child(self, tokens: bytes) -> Node | None:
        """The node directly behind it that has these tokens, None where there is none."""
        below = self.below
        if isinstance(below, dict):
            return below.get(tokens)
        return below if below is not None and below.tokens == tokens else None

    def __repr__(self) -> str:
        return f"Node(block={self.block}, depth={self.depth}, key={self.key.hex()[:12]}…)"
