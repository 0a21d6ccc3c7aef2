"""How a text would enter: what is there of it, what it must take, and why no more was found. Changes nothing but
opening accounts and roots.

Finding costs one dictionary look-up for each block. Keys of what was not found, and the reason, cost a hash for each
block and are made once, when the text does enter (`explain`), however often it asked before.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from pagemill.base.errors import IntegrityError
from pagemill.base.params import CacheOptions
from pagemill.cache.block import Node
from pagemill.cache.entry import Entry
from pagemill.cache.evicted import EvictedBlocks
from pagemill.cache.keys import TOKEN_BYTES, Fingerprint, chain_keys
from pagemill.cache.pool import BlockPool
from pagemill.cache.prefix import Match, PrefixTree, common_tokens
from pagemill.cache.receipt import Lookup, Miss, RecentKeys
from pagemill.cache.tenancy import Account, Tenancy
from pagemill.cache.windows import Windows


class Lookups:
    """Finds texts in a tree. Mutated by `fail` and the calls that forget; whoever evicts tells `evicted`.

    evicted: blocks that left for want of room. failed: keys that a colder tier held and could not deliver. Both are
    bounded by four times the cache, and a key is of one namespace, so that no reason tells of another.
    """

    __slots__ = ("_last", "_pool", "_tenancy", "_tree", "_windows", "evicted", "failed")

    def __init__(
        self, pool: BlockPool, tree: PrefixTree, tenancy: Tenancy, windows: Windows | None, num_keys: int
    ) -> None:
        self._pool = pool
        self._tree = tree
        self._tenancy = tenancy
        self._windows = windows
        self.evicted = EvictedBlocks(num_keys)
        self.failed = RecentKeys(num_keys)
        self._last: tuple[CacheOptions, Fingerprint, Account, Node] | None = None

    def find(
        self,
        options: CacheOptions,
        fingerprint: Fingerprint,
        tokens: array[int],
        num_tokens: int,
        *,
        whole: bool = False,
    ) -> Entry:
        """How a sequence whose known tokens are the first `num_tokens` of `tokens` would enter now. whole: with hits of
        whole blocks alone.

        Raises IntegrityError where the tree names a block that the pool does not have for it.
        """
        pool, size = self._pool, self._tree.block_size
        count = -(-num_tokens // size)
        for root in self._tree.drop_empty_roots():
            self.forget([root])
        account, root = self._place(options, fingerprint)
        room = self._tenancy.room(account, pool.num_free, pool.num_cached)
        spare = self._tenancy.available(account, pool.num_free, pool.num_cached)
        most = num_tokens - 1
        if options.bypass or most < 1:
            nothing = Match(root, [])
            if self._windows is not None:
                pages = count + self._windows.left(0, count, 0)
                spare, room = min(spare, pages), min(room, pages)
            return Entry(account, nothing, root, [], None, 0, max(most, 0), 0, count, spare, room, b"", options)
        data = tokens[:num_tokens].tobytes()
        match = self._tree.find(root, data, most)
        if whole:
            match = Match(root, match.nodes)
        found = self._tree.num_tokens(match)
        kept = found if self._windows is None else self._cut(match, found)
        if kept < found:
            tail_node = match.nodes[kept // size] if kept // size < len(match.nodes) else match.tail
            match = Match(root, match.nodes[: kept // size], tail_node if kept % size else None, kept % size)
        shared = [node.block for node in match.nodes]
        self._check(match)
        revived = pool.num_idle(shared)
        spare, room = spare - revived, room - revived
        num_new = count - len(shared)
        tail, num_tail = match.tail, match.num_tail_tokens
        if tail is not None and not pool.num_holders(tail.block):
            if spare - 1 >= num_new:
                spare, room = spare - 1, room - 1
            elif spare >= num_new:  # the source would have to go to make room for its own copy
                if self._windows is not None:
                    return self.find(options, fingerprint, tokens, num_tokens, whole=True)
                tail, num_tail = None, 0
        num_hit = len(shared) * size + num_tail
        if self._windows is not None:
            pages = num_new + self._windows.left(num_hit, count, tail is not None)
            if tail is not None and pages < num_new:
                return self.find(options, fingerprint, tokens, num_tokens, whole=True)
            spare, room = min(spare, pages), min(room, pages)
        node = match.nodes[-1] if match.nodes else root
        return Entry(
            account, match, node, shared, tail, num_tail, most, num_hit, num_new, spare, room, data, options,
            window_cut=kept < found,
        )  # fmt: skip

    def _place(self, options: CacheOptions, fingerprint: Fingerprint) -> tuple[Account, Node]:
        """Whose blocks a request's are, and where its text begins. Many requests in turn have the same options."""
        if self._last is not None:
            last, of, account, root = self._last
            if last is options and of is fingerprint and root.alive:
                return account, root
        namespace = self._tenancy.namespace(options.tenant, options.salt, options.public)
        account, root = self._tenancy.account(namespace), self._tree.root(namespace, fingerprint)
        self._last = (options, fingerprint, account, root)
        return account, root

    def _cut(self, match: Match, num_tokens: int) -> int:
        """So many tokens of a match as every window group allows."""
        assert self._windows is not None
        blocks = [node.block for node in match.nodes] + ([] if match.tail is None else [match.tail.block])
        return self._windows.longest(blocks, num_tokens)

    def _check(self, match: Match) -> None:
        """Each block that is about to be read is published, and for this very text."""
        known, published, tail = self._tree.nodes, self._pool.published, match.tail
        for node in match.nodes if tail is None else [*match.nodes, tail]:
            if known.get(node.block) is not node or not published[node.block]:
                raise IntegrityError(f"{node} of the prefix cache is not what its block holds")

    def missing(self, entry: Entry) -> tuple[list[bytes], list[bytes]]:
        """Keys and packed tokens of the text's whole blocks that were not found, in order."""
        size, data = self._tree.block_size * TOKEN_BYTES, entry.data
        first, end = len(entry.shared) * size, entry.num_asked * TOKEN_BYTES - size + 1 if data else 0
        edges = [data[at : at + size] for at in range(first, end, size)]
        return chain_keys(entry.node.key, edges), edges

    def explain(
        self, entry: Entry, fingerprint: Fingerprint, missing: list[bytes], now_s: float, policy: str
    ) -> Lookup:
        """What the text's owner is told: tokens asked for and hit, and the reason of the first miss."""
        if not entry.data:
            miss = Miss("bypassed", 0) if entry.options.bypass else None
        elif entry.num_hit == entry.num_asked:
            miss = None
        else:
            miss = self._miss(entry, fingerprint, missing, now_s, policy)
        return Lookup(entry.num_asked, entry.num_hit, entry.num_hit, miss)

    def _miss(self, entry: Entry, fingerprint: Fingerprint, missing: list[bytes], now_s: float, policy: str) -> Miss:
        at, node = entry.num_hit, entry.node
        if entry.window_cut:
            return Miss("window not kept", at)
        if missing and self.failed.when(missing[0]) is not None:
            return Miss("tier failed", at)
        start = len(entry.shared) * self._tree.block_size * TOKEN_BYTES
        rest = entry.data[start : min(start + self._tree.block_size * TOKEN_BYTES, entry.num_asked * TOKEN_BYTES)]
        num_tail = at - len(entry.shared) * self._tree.block_size
        left = self.evicted.find(node, rest) if missing else None
        if left is None:
            left = self.evicted.latest(node, rest[:TOKEN_BYTES])
            if left is not None and common_tokens(left.tokens, rest) <= num_tail:
                left = None
        if left is not None and left.left_s is not None:
            return Miss("evicted", at, max(now_s - left.left_s, 0.0), policy)
        if self._seen_in_other_format(entry, fingerprint):
            return Miss("other format", at)
        tail = entry.match.tail
        goes_on = tail is None or len(tail.tokens) > TOKEN_BYTES * entry.match.num_tail_tokens
        return Miss("differs" if at and node.below and goes_on else "not seen", at)

    def _seen_in_other_format(self, entry: Entry, fingerprint: Fingerprint) -> bool:
        """True where more of the text is, or was lately, in the same namespace under another fingerprint."""
        if not self._tree.has_formats:
            return False
        options, most = entry.options, entry.num_asked
        namespace = self._tenancy.namespace(options.tenant, options.salt, options.public)
        size = self._tree.block_size
        for root in self._tree.siblings_of(namespace, fingerprint):
            other = self._tree.find(root, entry.data, most)
            if len(other.nodes) * size + other.num_tail_tokens > entry.num_hit:
                return True
            end = (entry.num_hit // size + 1) * size
            if end <= most:
                edges, _ = self._edges(array("i", entry.data[: end * TOKEN_BYTES]))
                if len(self._known_chain(root, edges)) > len(edges):
                    return True
        return False

    def fail(self, key: bytes, now_s: float) -> None:
        """Remember that a tier held a block of this key and could not deliver it."""
        self.failed.add(key, now_s)

    def left(self, node: Node) -> None:
        """A block left, and not for want of room: what lay behind it is not remembered without it."""
        self.evicted.forget_behind(node)

    def forget(self, nodes: Iterable[Node]) -> None:
        """Nothing of these blocks is remembered, nor of what lay behind them, as after a purge."""
        for node in nodes:
            self.failed.forget(node.key)
            self.evicted.forget(node)

    def _known_chain(self, root: Node, edges: Iterable[bytes]) -> list[Node]:
        """`root`, and behind it the blocks with these tokens that are there or remembered, as far as they go."""
        chain = [root]
        for own in edges:
            node = chain[-1].child(own) or self.evicted.find(chain[-1], own)
            if node is None:
                break
            chain.append(node)
        return chain

    def forget_prefix(self, root: Node, tokens: array[int]) -> None:
        """Nothing is remembered of blocks that hold the last of these tokens, behind all others, or any behind it."""
        edges, rest = self._edges(tokens)
        chain = self._known_chain(root, edges)
        last = chain[-1:] if len(chain) > len(edges) else []
        if rest:
            self.forget([each for node in last for each in self.evicted.behind(node) if each.tokens.startswith(rest)])
        else:
            self.failed.forget([root.key, *chain_keys(root.key, edges)][-1])
            self.forget(last)

    def forget_text(self, root: Node, tokens: array[int]) -> None:
        """Nothing is remembered of blocks of this text that no other goes on from."""
        edges, rest = self._edges(tokens)
        size = self._tree.block_size * TOKEN_BYTES
        chain = self._known_chain(root, edges)
        for key in chain_keys(root.key, edges)[len(chain) - 1 :]:
            self.failed.forget(key)
        for node, following in zip(reversed(chain), reversed([*edges, rest][: len(chain)]), strict=True):
            ends = [each for each in self.evicted.behind(node) if len(each.tokens) < size]
            self.forget([each for each in ends if following.startswith(each.tokens)])
            if node.left_s is not None and not self.evicted.behind(node):
                self.forget([node])

    def _edges(self, tokens: array[int]) -> tuple[list[bytes], bytes]:
        """Packed tokens of the whole blocks of a text, and what is left behind them."""
        size, data = self._tree.block_size * TOKEN_BYTES, tokens.tobytes()
        *whole, rest = [data[at : at + size] for at in range(0, len(data) + 1, size)]
        return whole, rest

    def resize(self, num_keys: int) -> None:
        """Remember so many keys of each kind at the most."""
        self.evicted.resize(num_keys)
        self.failed.resize(num_keys)

    def clear(self) -> None:
        """Nothing is remembered."""
        self.evicted.clear()
        self.failed.clear()
