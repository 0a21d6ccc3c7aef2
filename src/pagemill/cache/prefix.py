"""The tree of published blocks: which texts are in the cache, found token by token. Owns the nodes, not their pages.

    root of a namespace ── tokens 0..15 ── tokens 16..31 ── tokens 32..36 (tail, shorter than a block)
                                       └── tokens 16..31' …

An edge is the block's own tokens as packed bytes, so finding a child compares every token at C speed, on every hit,
below a root that only this namespace and fingerprint reach. Among the children of the last whole match, the longest
common beginning stands beside the place where the text itself would be sorted in.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from pagemill.base.errors import IntegrityError
from pagemill.cache.block import Node
from pagemill.cache.keys import TOKEN_BYTES, Fingerprint, Namespace, Secrets, chain_keys, child_key, root_key

MOST_EMPTY_ROOTS = 4096


class Match(NamedTuple):
    """What the tree holds of a text. nodes: blocks that match whole, from the start. tail: the child of the last one
    whose first `num_tail_tokens` tokens come next in the text, None without such. root: where the chain begins."""

    root: Node
    nodes: list[Node]
    tail: Node | None = None
    num_tail_tokens: int = 0


def common_tokens(a: bytes, b: bytes) -> int:
    """How many whole tokens two packed texts have in common at their beginning."""
    size = min(len(a), len(b))
    difference = int.from_bytes(a[:size], "little") ^ int.from_bytes(b[:size], "little")
    if not difference:
        return size // TOKEN_BYTES
    return ((difference & -difference).bit_length() - 1) // (8 * TOKEN_BYTES)


class PrefixTree:
    """Nodes of all namespaces. Mutated by `root`, `add`, `add_run`, `remove`, `forget_root` and `clear`.

    block_size: tokens in a block. nodes: by block id.
    """

    __slots__ = ("_block_bytes", "_crowd", "_fingerprints", "_roots", "_secrets", "block_size", "nodes")

    def __init__(self, block_size: int, secrets: Secrets) -> None:
        self.block_size = block_size
        self.nodes: dict[int, Node] = {}
        self._block_bytes = block_size * TOKEN_BYTES
        self._secrets = secrets
        self._roots: dict[tuple[Namespace, Fingerprint], Node] = {}
        self._fingerprints: dict[Fingerprint, None] = {}
        self._crowd = MOST_EMPTY_ROOTS

    @property
    def index(self) -> dict[bytes, Node]:
        """The nodes by key, made anew: O(nodes)."""
        return {node.key: node for node in self.nodes.values()}

    def root(self, namespace: Namespace, fingerprint: Fingerprint) -> Node:
        """Where texts of this namespace under this fingerprint begin; made at first use."""
        name = (namespace, fingerprint)
        root = self._roots.get(name)
        if root is None:
            key = root_key(self._secrets.of(namespace), namespace, fingerprint)
            root = self._roots[name] = Node(-1, key, b"", None, -1)
            self._fingerprints[fingerprint] = None
        return root

    def roots_of(self, tenant: str, *, public: bool = False) -> list[tuple[Namespace, Fingerprint, Node]]:
        """Every root of a tenant's own namespaces, or of a public name, salted ones included."""
        return [(n, f, root) for (n, f), root in self._roots.items() if n.tenant == tenant and n.public == public]

    @property
    def has_formats(self) -> bool:
        """True where there are texts under more than one fingerprint."""
        return len(self._fingerprints) > 1

    def siblings_of(self, namespace: Namespace, fingerprint: Fingerprint) -> list[Node]:
        """Roots of the same namespace under other fingerprints."""
        found = (self._roots.get((namespace, other)) for other in self._fingerprints if other != fingerprint)
        return [root for root in found if root is not None]

    def forget_root(self, namespace: Namespace, fingerprint: Fingerprint) -> None:
        """Drop a root that has no blocks."""
        root = self._roots.get((namespace, fingerprint))
        if root is not None and not root.below:
            root.alive = False
            del self._roots[(namespace, fingerprint)]

    def drop_empty_roots(self) -> list[Node]:
        """Drop roots that have neither blocks nor open sequences where there are many, so that salts do not pile up.
        Returns them; O(roots), seldom enough to cost O(1) for each that was made."""
        if len(self._roots) <= self._crowd:
            return []
        empty = [name for name, root in self._roots.items() if not root.below and not root.num_sequences]
        dropped = [self._roots[name] for name in empty]
        for name in empty:
            self.forget_root(*name)
        self._crowd = max(MOST_EMPTY_ROOTS, 2 * len(self._roots))
        return dropped

    def clear(self) -> None:
        """No text is there. Nodes that somebody still names are dead."""
        for node in (*self._roots.values(), *self.nodes.values()):
            node.alive = False
        self.nodes, self._roots, self._fingerprints = {}, {}, {}

    def find(self, root: Node, tokens: bytes, most: int) -> Match:
        """What is there of the first `most` tokens of a text, whole blocks first. tokens: packed."""
        size = self._block_bytes
        node, end = root, most * TOKEN_BYTES
        nodes: list[Node] = []
        for at in range(0, end - size + 1, size):
            below, own = node.below, tokens[at : at + size]
            if isinstance(below, dict):
                child = below.get(own)
                if child is None:
                    break
            elif below is not None and below.tokens == own:
                child = below
            else:
                break
            nodes.append(child)
            node = child
        at = len(nodes) * size
        rest = tokens[at : min(at + size, end)]
        if not rest or not node.below:
            return Match(root, nodes)
        tail, num_tokens = self._nearest(node, rest)
        return Match(root, nodes, tail, num_tokens) if num_tokens else Match(root, nodes)

    def num_tokens(self, match: Match) -> int:
        """Tokens that a match has in all."""
        return len(match.nodes) * self.block_size + match.num_tail_tokens

    def _order(self, node: Node) -> list[bytes]:
        """The tokens of a node's children, sorted; kept from the first time that somebody asks."""
        if node.order is None:
            node.order = sorted(node.children)
        return node.order

    def _nearest(self, node: Node, rest: bytes) -> tuple[Node, int]:
        order = self._order(node)
        place = bisect_left(order, rest)
        best, most = order[0], 0
        for each in order[max(place - 1, 0) : place + 1]:
            if each.startswith(rest[:TOKEN_BYTES]) and (count := common_tokens(each, rest)) > most:
                best, most = each, count
        return node.children[best], most

    def extended_by(self, parent: Node, tokens: bytes) -> Node | None:
        """The child of `parent` that begins with `tokens`, if there is one: it says as much and more."""
        order = self._order(parent)
        place = bisect_left(order, tokens)
        if place < len(order) and order[place].startswith(tokens):
            return parent.children[order[place]]
        return None

    def beginning_of(self, parent: Node, tokens: bytes) -> Node | None:
        """The child of `parent` that `tokens` go on from, if there is one and it is not they themselves."""
        if not parent.below:
            return None
        order = self._order(parent)
        place = bisect_left(order, tokens)
        if place and len(order[place - 1]) < len(tokens) and tokens.startswith(order[place - 1]):
            return parent.children[order[place - 1]]
        return None

    def add(self, parent: Node, block: int, tokens: bytes, key: bytes | None = None) -> Node:
        """Publish a block below `parent`. key: its content key where it is known already. It must not be there yet."""
        [node] = self.add_run(parent, [block], [tokens], [] if key is None else [key])
        return node

    def add_run(
        self, parent: Node, blocks: Sequence[int], tokens: Sequence[bytes], keys: Sequence[bytes] = ()
    ) -> list[Node]:
        """Publish blocks each below the one before it, the first below `parent`. keys: content keys of the first of
        them, as far as they are known already. None of them may be there yet."""
        known = self.nodes
        assert parent.child(tokens[0]) is None, "a block is published once"
        assert known.keys().isdisjoint(blocks), f"one of the blocks {blocks} is published already"
        if len(keys) < len(tokens):
            keys = [*keys, *chain_keys(keys[-1] if keys else parent.key, tokens[len(keys) :])]
        if parent.order is not None:
            insort(parent.order, tokens[0])
        siblings = parent.children if parent.below else None
        depth, found, before = parent.depth, [], parent
        for block, own, key in zip(blocks, tokens, keys, strict=True):
            depth += 1
            node = known[block] = before.below = Node(block, key, own, before, depth)
            found.append(node)
            before = node
        if siblings is not None:
            siblings[tokens[0]] = found[0]
            parent.below = siblings
        return found

    def remove(self, node: Node) -> Node:
        """Take a leaf out; returns its parent."""
        parent, tokens = node.parent, node.tokens
        assert parent is not None and not node.below, f"{node} is a root or has children"  # noqa: PT018
        if isinstance(parent.below, dict):
            del parent.below[tokens]
        else:
            parent.below = None
        if parent.order is not None:
            if parent.below:
                del parent.order[bisect_left(parent.order, tokens)]
            else:
                parent.order = None
        del self.nodes[node.block]
        node.alive = False
        return parent

    def remove_run(self, nodes: Sequence[Node]) -> Node:
        """Take out a leaf and nodes above it, each with the one before it as its only child; they stand in no order any
        more. Returns the parent of the last."""
        known = self.nodes
        for node, parent in pairwise(nodes):
            parent.below = parent.order = node.shelf = None
            node.alive = False
            del known[node.block]
        nodes[-1].shelf = None
        return self.remove(nodes[-1])

    def is_child(self, node: Node) -> bool:
        """True where the node's parent leads to it."""
        return node.parent is not None and node.parent.child(node.tokens) is node

    def chain(self, node: Node) -> list[Node]:
        """The nodes from the start of the text to `node`."""
        found: list[Node] = []
        each: Node | None = node
        while each is not None and each.parent is not None:
            found.append(each)
            each = each.parent
        return found[::-1]

    def below(self, node: Node) -> Iterator[Node]:
        """`node` (unless a root) and everything under it, children before their parents."""
        stack: list[tuple[Node, bool]] = [(node, False)]
        while stack:
            each, opened = stack.pop()
            if opened:
                if each.parent is not None:
                    yield each
                continue
            stack.append((each, True))
            stack.extend((child, False) for child in list(each.children.values()))

    def verify(self) -> None:
        """Keys, edges and indices agree, in O(number of nodes · tokens), for tests. Raises IntegrityError."""
        seen = 0
        for (namespace, fingerprint), root in self._roots.items():
            if root.key != root_key(self._secrets.of(namespace), namespace, fingerprint):
                raise IntegrityError(f"the root of {namespace} has another namespace's key")
            for node in self.below(root):
                seen += 1
                parent = node.parent
                assert parent is not None
                right = (
                    node.key == child_key(parent.key, node.tokens)
                    and parent.child(node.tokens) is node
                    and self.nodes.get(node.block) is node
                    and node.depth == parent.depth + 1
                    and (len(node.tokens) == self._block_bytes or not node.below)
                )
                if not right or (parent.order is not None and parent.order != sorted(parent.children)):
                    raise IntegrityError(f"the tree of prefixes is damaged at {node}")
        num_keys = len(self.index)
        if not seen == len(self.nodes) == num_keys:
            raise IntegrityError(f"{seen} nodes in the tree, {len(self.nodes)} blocks, {num_keys} keys")
