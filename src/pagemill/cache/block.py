"""A published block as the tree of prefixes knows it. Owns the node, not its place in a pool or in an order."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagemill.cache.policies.base import Policy

DEFAULT_PRIORITY = 50


@dataclass(slots=True, eq=False)
class Node:
    """A block with known tokens, or the root of a namespace (block -1). Mutated by PrefixTree and the manager.

    key: its content key. tokens: packed, 4 bytes each; fewer than a block's for the tail of a text. children: by their
    tokens; order: the same tokens, sorted, so that the longest common beginning is next to where a text would stand.
    depth: index in its chain, -1 for a root. account: whose blocks it counts among. priority: 0 to 100; expires_s: when
    that ends, on the cache's clock, None for never. shelf: the policy that it stands in, as `handle`: its block, or the
    block that it had before a smaller size moved it. alive: False once it is taken
    out of the tree; whoever still holds the block may read it, and nothing is published behind it. num_sequences: of a
    root, how many are open below it.
    """

    block: int
    key: bytes
    tokens: bytes
    parent: Node | None
    depth: int
    account: int = 0
    priority: int = DEFAULT_PRIORITY
    expires_s: float | None = None
    children: dict[bytes, Node] = field(default_factory=dict)
    order: list[bytes] = field(default_factory=list)
    shelf: Policy | None = None
    handle: int = -1
    alive: bool = True
    num_sequences: int = 0

    def __repr__(self) -> str:
        return f"Node(block={self.block}, depth={self.depth}, key={self.key.hex()[:12]}…)"
