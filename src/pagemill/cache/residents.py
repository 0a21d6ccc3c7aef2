"""Blocks that are published, in use or both: taken, held, published and evicted, a run of them at a time.

Owns tree, shelves, accounts and pending copies together, so that pool, tree, policy and accounts always change as one.
A block's reasons to stay are its holders and its children: a policy sees it locked while there is one. What a text
finds of them, pins and purges are `sharing.py`.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from pagemill.base.errors import CapacityError, IntegrityError
from pagemill.base.params import Retain
from pagemill.base.transfer import Copy
from pagemill.cache.block import Node
from pagemill.cache.entry import Removed, SharingConfig, Stored
from pagemill.cache.eviction import Shelves
from pagemill.cache.keys import TOKEN_BYTES, Secrets
from pagemill.cache.lookup import Lookups
from pagemill.cache.pool import BlockPool
from pagemill.cache.prefix import PrefixTree
from pagemill.cache.tenancy import Account, Tenancy
from pagemill.cache.windows import Windows

KEYS_PER_BLOCK = 4

# Why a block can no longer be found: room for others, its tenant's cap, a smaller cache; a purge, a longer text that
# says as much and more, tokens taken back, a cache that contradicted itself.
Departure = Literal["capacity", "quota", "resize", "purge", "replaced", "rollback", "quarantine"]
EVICTIONS: tuple[Departure, ...] = ("capacity", "quota", "resize")


class ResidentBlocks:
    """Blocks with contents over a pool. Mutated by every method that is not a question.

    now_s: time of the last `advance`. on_event, listener: told of each Stored and Removed, in order, once the run that
    they came with is done. num_left: blocks that can no longer be found, by reason. num_wiped: pages overwritten.
    """

    __slots__ = (
        "_config", "_copies", "_owner", "_pool", "_version", "listener", "lookups", "now_s", "num_left", "num_wiped",
        "on_event", "secrets", "shelves", "tenancy", "tree", "windows",
    )  # fmt: skip

    def __init__(self, pool: BlockPool, block_size: int, config: SharingConfig) -> None:
        self._pool = pool
        self._config = config
        self._owner = array("i", bytes(4 * pool.num_blocks))
        self._copies: dict[int, Copy] = {}  # by target
        self._version = 0  # of everything that an entry depends on
        self.secrets = Secrets()
        self.tree = PrefixTree(block_size, self.secrets)
        self.shelves = Shelves(config.policy, pool.num_blocks, config.page_bytes, config.makers)
        self.tenancy = Tenancy(pool.num_blocks, block_size, known_only=config.known_tenants_only)
        self.windows = Windows.make(config.windows, block_size, config.wipes, pool.is_published)
        self.lookups = Lookups(pool, self.tree, self.tenancy, self.windows, KEYS_PER_BLOCK * pool.num_blocks)
        self.num_left: dict[str, int] = dict.fromkeys(get_args(Departure), 0)
        self.num_wiped = 0
        self.now_s = 0.0
        self.on_event: Callable[[Stored | Removed], None] | None = None
        self.listener: Callable[[Stored | Removed], None] | None = None

    @property
    def num_evicted(self) -> int:
        """Blocks that left because others took their place."""
        return sum(self.num_left[reason] for reason in EVICTIONS)

    def available(self, account: Account) -> int:
        """Blocks that the account could take now."""
        return self.tenancy.available(account, self._pool.num_free, self._pool.num_cached)

    # Blocks in and out

    def allocate(self, account: Account, count: int) -> array[int]:
        """Take `count` blocks for an account, evicting what has to go. Raises CapacityError, and changes nothing, where
        that is not enough."""
        pool, owner = self._pool, self._owner
        self._version += 1
        if count > max(self.available(account), 0):
            raise self._shortage(account, count)
        if count and account.cap is not None and account.used + count > account.cap:
            self._evict(account.used + count - account.cap, [account], "quota")
        while (short := count - pool.num_free) > 0:
            givers = self.tenancy.givers(account, pool.num_cached)
            self._evict(1 if self.tenancy.is_parted else short, givers, "capacity")
        blocks, index = pool.allocate(count), account.index
        for block in blocks:
            owner[block] = index
        account.used += count
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that are held or published."""
        accounts, nodes = self.tenancy.accounts, self.tree.nodes
        self._version += 1
        for block in self._pool.retain(blocks):
            node = nodes[block]
            accounts[self._owner[block]].cached -= 1
            if not node.below:
                self.shelves.lock(node)

    def release(self, blocks: Sequence[int]) -> None:
        """Take a holder from each block. Copies into blocks that become free are no longer made."""
        accounts, nodes, owner = self.tenancy.accounts, self.tree.nodes, self._owner
        self._version += 1
        cached, free = self._pool.release(blocks)
        for block in cached:
            node = nodes[block]
            if not node.below:
                self.shelves.unlock(node)
        for block in free:
            accounts[owner[block]].used -= 1
        above = self._by_account(cached)
        for account, count in above:
            account.cached += count
        for block in free if self._copies else ():
            if block in self._copies:
                self.release([self._copies.pop(block).source])
        for account, _ in above:  # its cap may have been lowered while these were in use
            self._keep_cap(account)

    def _by_account(self, blocks: Sequence[int]) -> list[tuple[Account, int]]:
        """How many of the blocks are whose."""
        accounts = self.tenancy.accounts
        if len(accounts) == 1:
            return [(accounts[0], len(blocks))]
        return [(accounts[index], count) for index, count in Counter(map(self._owner.__getitem__, blocks)).items()]

    # Publication

    def publish(
        self,
        parent: Node,
        blocks: Sequence[int],
        tokens: Sequence[bytes],
        keys: Sequence[bytes] = (),
        wishes: Sequence[Retain | None] = (),
        text: tuple[int, int] = (0, 0),
    ) -> list[Node]:
        """Let held blocks of one account be found, each behind the one before it and the first behind `parent`. What
        its tokens begin with and nobody holds makes way for it.

        tokens: of each block, packed; only the last block may be part-filled. keys: as for `PrefixTree.add_run`.
        wishes: priority of each, or none at all. text: as policies are told, `Shelves.insert`.
        """
        self._version += 1
        account = self.tenancy.accounts[self._owner[blocks[0]]]
        shorter = self.tree.beginning_of(parent, tokens[0])
        was_leaf = not parent.below
        nodes = self.tree.add_run(parent, blocks, tokens, keys)
        if parent.gone is not None:
            self.lookups.evicted.came_back(nodes)
        self._pool.publish(blocks)
        if account.index:
            for node in nodes:
                node.account = account.index
        if was_leaf and parent.shelf is not None and not self._pool.num_holders(parent.block):
            self.shelves.lock(parent)
        if len(nodes) > 1 and not wishes and len(tokens[-1]) == len(tokens[0]):
            if len(keys) < len(nodes):
                keys = [node.key for node in nodes]
            self.shelves.insert_run(nodes, keys, account.partition, len(tokens[0]) // TOKEN_BYTES, text)
        else:
            for node, wish in zip(nodes, wishes or [None] * len(nodes), strict=True):
                if wish is not None:
                    node.priority = wish.priority
                    if wish.ttl_s is not None:
                        self.shelves.expire_at(node, self.now_s + wish.ttl_s)
                self.shelves.insert(node, account.partition, len(node.tokens) // TOKEN_BYTES, locked=True, text=text)
        if shorter is not None and not self._pool.num_holders(shorter.block):
            self.discard(shorter, "replaced")
        if self.on_event is not None or self.listener is not None:
            for node in nodes:
                self._tell(Stored(node.key, parent.key, node.block, len(node.tokens) // TOKEN_BYTES))
                parent = node
        return nodes

    def discard(self, node: Node, reason: Departure) -> None:
        """A leaf can no longer be found; without a holder its block becomes free, and its page is wiped."""
        block = node.block
        self._version += 1
        self.shelves.remove(node, evicted=False)
        parent = self.tree.remove(node)
        if not self._pool.num_holders(block):
            account = self.tenancy.accounts[self._owner[block]]
            account.cached -= 1
            account.used -= 1
        self._pool.unpublish([block])
        if self.windows is not None:
            self.windows.drop(block)
        if parent.shelf is not None and not parent.below and not self._pool.num_holders(parent.block):
            self.shelves.unlock(parent)
        self.lookups.left(node)
        self.num_left[reason] += 1
        if self.on_event is not None or self.listener is not None:
            self._tell(Removed(node.key, False))

    def _evict(self, count: int, givers: Sequence[Account | None], reason: Departure) -> None:
        """So many blocks leave, of those who give; nobody holds them, and they become free in the order in which they
        left."""
        self._version += 1
        partitions = [0 if each is None else each.partition for each in givers]
        gone: list[Node] = []
        try:
            while len(gone) < count:
                block = self.shelves.victim(partitions)
                if block is None:
                    raise IntegrityError(
                        "no cached block can be evicted although the accounts say so; report this as a bug"
                    )
                run = self._leaving(self.tree.nodes[block], count - len(gone))
                num_left = self.shelves.evict_run(run)
                if num_left < len(run):
                    del run[num_left:]
                    self.tree.remove_run(run)
                else:
                    parent = self.tree.remove_run(run)
                    if parent.shelf is not None and not parent.below and not self._pool.num_holders(parent.block):
                        self.shelves.unlock(parent)
                gone += run
        finally:
            self._evicted(gone, reason)

    def _leaving(self, node: Node, most: int) -> list[Node]:
        """A leaf that nobody holds, and those before it in its chain that have no other reason to stay: each in the
        order of the same policy, with the one behind it as its only child."""
        run, shelf, holders = [node], node.shelf, self._pool.holders
        for _ in range(most - 1):
            parent = node.parent
            if parent is None or parent.shelf is not shelf or parent.below is not node or holders[parent.block]:
                break
            run.append(parent)
            node = parent
        return run

    def _evicted(self, nodes: list[Node], reason: Departure) -> None:
        """These are in no order and no tree any more."""
        blocks = [node.block for node in nodes]
        for account, count in self._by_account(blocks):
            account.cached -= count
            account.used -= count
        self._pool.unpublish(blocks)
        self.lookups.evicted.add(nodes, self.now_s)
        self.num_left[reason] += len(nodes)
        if self.windows is not None:
            for node in nodes:
                self.windows.drop(node.block)
        if self.on_event is not None or self.listener is not None:
            for node in nodes:
                self._tell(Removed(node.key, True))

    def _tell(self, event: Stored | Removed) -> None:
        for told in (self.on_event, self.listener):
            if told is not None:
                told(event)

    def _keep_cap(self, account: Account) -> None:
        while account.cap is not None and account.used > account.cap and account.cached:
            self._evict(min(account.used - account.cap, account.cached), [account], "quota")

    def evict_any(self) -> None:
        """Evict a block as for a smaller cache: of who is above a floor, and only then of anyone."""
        self._evict(1, self.tenancy.to_shrink(self._pool.num_cached), "resize")

    def _shortage(self, account: Account, count: int) -> CapacityError:
        return account.shortage(count) or self._pool.shortage(count, self.available(account))

    # Priority

    def retain(self, node: Node, retain: Retain) -> None:
        """Give a published block this priority and this much time from now, if that is more than it has."""
        until = None if retain.ttl_s is None else self.now_s + retain.ttl_s
        if retain.priority > node.priority:
            self.shelves.expire_at(node, until)
        elif retain.priority == node.priority and node.expires_s is not None:
            self.shelves.expire_at(node, None if until is None else max(until, node.expires_s))
        self._shelve(node, max(node.priority, retain.priority))

    def _shelve(self, node: Node, priority: int, *, anew: bool = False) -> None:
        if priority == node.priority and not anew:
            return
        node.priority = priority
        locked = bool(node.below) or self._pool.num_holders(node.block) > 0
        partition = self.tenancy.accounts[node.account].partition
        self.shelves.move(node, partition, len(node.tokens) // TOKEN_BYTES, locked=locked)
