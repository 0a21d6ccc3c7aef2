"""Which blocks several texts share, and which go when room is short. Owns tree, shelves, accounts and copies together.

The manager owns sequences and their lengths; what it takes, publishes and gives back passes through here, so that pool,
tree, policy and accounts always change together. A block's reasons to stay are its holders and its children: a policy
sees it locked while there is one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence

from pagemill.base.errors import CapacityError, IntegrityError, RequestError
from pagemill.base.params import CacheOptions, Retain
from pagemill.base.transfer import NO_MOVES, Copy, Moves
from pagemill.cache.block import DEFAULT_PRIORITY, Node
from pagemill.cache.entry import Entered, Entry, Removed, SharingConfig, Stored
from pagemill.cache.eviction import Shelves
from pagemill.cache.keys import TOKEN_BYTES, Secrets
from pagemill.cache.leases import Lease, Leases
from pagemill.cache.lookup import Lookups
from pagemill.cache.pool import BlockPool
from pagemill.cache.prefix import PrefixTree
from pagemill.cache.tenancy import Account, Tenancy
from pagemill.cache.verification import verify_blocks
from pagemill.cache.windows import Windows

KEYS_PER_BLOCK = 4


class SharedBlocks:
    """Published blocks over a pool. Mutated by every method that is not a question.

    now_s: time of the last `advance`. on_event, listener: told of each Stored and Removed, in order. on_used: of
    the nodes that a sequence found, first to last. num_wiped: pages overwritten.
    """

    __slots__ = (
        "_config", "_copies", "_entry", "_owner", "_patrol", "_pool", "_version", "leases", "listener", "lookups",
        "now_s", "num_evicted", "num_wiped", "on_event", "on_used", "secrets", "shelves", "tenancy", "tree", "windows",
    )  # fmt: skip

    def __init__(self, pool: BlockPool, block_size: int, config: SharingConfig) -> None:
        self._pool = pool
        self._config = config
        self._owner = array("i", bytes(4 * pool.num_blocks))
        self._copies: dict[int, Copy] = {}  # by target
        self._patrol = 0  # the block that `check` looks at next
        self._version = 0  # of everything that an entry depends on
        self._entry: tuple[array[int], int, CacheOptions, int, Entry] | None = None
        self.secrets = Secrets()
        self.tree = PrefixTree(block_size, self.secrets)
        self.shelves = Shelves(config.policy, pool.num_blocks, config.page_bytes)
        self.tenancy = Tenancy(pool.num_blocks, known_only=config.known_tenants_only)
        self.windows = Windows.make(config.windows, block_size, config.wipes, pool.is_published)
        self.lookups = Lookups(pool, self.tree, self.tenancy, self.windows, KEYS_PER_BLOCK * pool.num_blocks)
        self.leases = Leases()
        self.num_evicted = self.num_wiped = 0
        self.now_s = 0.0
        self.on_event: Callable[[Stored | Removed], None] | None = None
        self.listener: Callable[[Stored | Removed], None] | None = None
        self.on_used: Callable[[Sequence[Node]], None] | None = None

    # What is there

    def available(self, account: Account) -> int:
        """Blocks that the account could take now."""
        count = self.tenancy.available(account, self._pool.num_free, self._pool.num_cached)
        return count if self.windows is None else min(count, self.windows.num_available())

    def entry(self, options: CacheOptions, tokens: array[int], num_tokens: int) -> Entry:
        """How a sequence whose known tokens are the first `num_tokens` of `tokens` would enter now."""
        last = self._entry
        if last is not None and last[0] is tokens and last[1:4] == (num_tokens, options, self._version):
            return last[4]
        self._make_room_for_accounts()
        entry = self.lookups.find(options, self._config.fingerprint, tokens, num_tokens)
        self._entry = (tokens, num_tokens, options, self._version, entry)
        return entry

    def account_of(self, options: CacheOptions) -> Account:
        """Whose blocks a request's are."""
        self._make_room_for_accounts()
        return self.tenancy.account(self.tenancy.namespace(options.tenant, options.salt, options.public))

    def _make_room_for_accounts(self) -> None:
        """Where names have piled up, idle accounts go, with their roots and secrets: nothing is found by these."""
        if not self.tenancy.is_crowded:
            return
        self._version += 1
        for account in self.tenancy.drop_idle():
            for namespace, fingerprint, _ in self.tree.roots_of(account.tenant, public=account.public):
                self.tree.forget_root(namespace, fingerprint)
            self.secrets.forget(account.tenant, public=account.public)

    @property
    def num_references(self) -> int:
        """Holders that are no sequences: leases, and sources of copies."""
        return self.leases.num_references + len(self._copies)

    def held_blocks(self) -> list[int]:
        """The blocks of these holders, one entry for each."""
        return [*self.leases.held_blocks(), *(copy.source for copy in self._copies.values())]

    def _root(self, options: CacheOptions) -> Node:
        namespace = self.tenancy.namespace(options.tenant, options.salt, options.public)
        return self.tree.root(namespace, self._config.fingerprint)

    def chain_of(self, options: CacheOptions, tokens: array[int]) -> list[Node]:
        """The published nodes of a text, as far as they go: whole blocks, and a tail that the text holds whole."""
        match = self.tree.find(self._root(options), tokens.tobytes(), len(tokens))
        whole = match.tail is not None and len(match.tail.tokens) == TOKEN_BYTES * match.num_tail_tokens
        return [*match.nodes, match.tail] if whole and match.tail is not None else match.nodes

    # Blocks in and out

    def enter(self, entry: Entry) -> Entered:
        """Take what `entry` names: hold the hits, copy the tail, allocate the rest.

        Raises CapacityError, and changes nothing, where blocks are short.
        """
        if entry.num_new > max(entry.num_spare, 0):
            raise self._shortage(entry.account, entry.num_new)
        missing = self.lookups.missing_keys(entry)
        lookup = self.lookups.explain(entry, self._config.fingerprint, missing, self.now_s, self.shelves.policy)
        self.shelves.touch_chain(entry.match.nodes)
        self.hold(entry.shared)
        if self.on_used is not None:
            self.on_used(entry.match.nodes)
        tail = entry.tail
        if tail is not None:
            self.shelves.touch_chain([tail])
            self.hold([tail.block])
        if missing:
            self.shelves.on_misses(missing, entry.account.partition)
        table = array("i", entry.shared)
        table.extend(self.allocate(entry.account, entry.num_new))
        if tail is not None:
            target = table[len(entry.shared)]
            self._copies[target] = Copy(tail.block, target, entry.num_tail_tokens)
        return Entered(table, lookup, missing)

    def allocate(self, account: Account, count: int) -> array[int]:
        """Take `count` blocks for an account, evicting what has to go. Raises CapacityError, and changes nothing, where
        that is not enough."""
        pool = self._pool
        self._version += 1
        if count > max(self.available(account), 0):
            raise self._shortage(account, count)
        while count and account.cap is not None and account.used + count > account.cap:
            self._evict([account])
        while pool.num_free < count:
            self._evict(self.tenancy.givers(account, pool.num_cached))
        blocks = pool.allocate(count)
        for block in blocks:
            self._owner[block] = account.index
        account.used += count
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that are held or published."""
        accounts, nodes = self.tenancy.accounts, self.tree.nodes
        self._version += 1
        for block in self._pool.retain(blocks):
            node = nodes[block]
            accounts[self._owner[block]].cached -= 1
            if not node.children:
                self.shelves.lock(node)

    def release(self, blocks: Sequence[int]) -> None:
        """Take a holder from each block. Copies into blocks that become free are no longer made."""
        accounts, nodes = self.tenancy.accounts, self.tree.nodes
        self._version += 1
        above: list[Account] = []
        for block in self._pool.release(blocks):
            account = accounts[self._owner[block]]
            if self._pool.is_published(block):
                account.cached += 1
                if account.cap is not None and account.used > account.cap:
                    above.append(account)
                node = nodes[block]
                if not node.children:
                    self.shelves.unlock(node)
            else:
                account.used -= 1
                if self._copies and block in self._copies:
                    self.release([self._copies.pop(block).source])
        for account in above:  # its cap was lowered while these were in use
            self._keep_cap(account)

    # Publication

    def publish(
        self,
        parent: Node,
        block: int,
        tokens: bytes,
        key: bytes | None,
        retain: Retain | None,
        text: tuple[int, int] = (0, 0),
    ) -> Node:
        """Let a held block be found behind `parent`. What its tokens begin with and nobody holds makes way for it.
        text: as policies are told, `Shelves.insert`."""
        self._version += 1
        shorter = self.tree.beginning_of(parent, tokens)
        node = self.tree.add(parent, block, tokens, key)
        self._pool.publish(block)
        node.account = self._owner[block]
        if retain is not None:
            node.priority = retain.priority
            if retain.ttl_s is not None:
                self.shelves.expire_at(node, self.now_s + retain.ttl_s)
        if len(parent.children) == 1 and parent.shelf is not None and not self._pool.num_holders(parent.block):
            self.shelves.lock(parent)
        partition = self.tenancy.accounts[node.account].partition
        self.shelves.insert(node, partition, len(tokens) // TOKEN_BYTES, locked=True, text=text)
        if shorter is not None and not self._pool.num_holders(shorter.block):
            self.discard(shorter)
        if self.on_event is not None or self.listener is not None:
            self._tell(Stored(node.key, parent.key, block, len(tokens) // TOKEN_BYTES))
        return node

    def discard(self, node: Node, *, evicted: bool = False) -> None:
        """A leaf can no longer be found; without a holder its block becomes free, and its page is wiped."""
        block = node.block
        self._version += 1
        self.shelves.remove(node, evicted=evicted)
        parent = self.tree.remove(node)
        if not self._pool.num_holders(block):
            account = self.tenancy.accounts[self._owner[block]]
            account.cached -= 1
            account.used -= 1
        self._pool.unpublish(block)
        if self.windows is not None:
            self.windows.drop(block)
        if parent.shelf is not None and not parent.children and not self._pool.num_holders(parent.block):
            self.shelves.unlock(parent)
        if self.on_event is not None or self.listener is not None:
            self._tell(Removed(node.key, evicted))

    def _tell(self, event: Stored | Removed) -> None:
        for told in (self.on_event, self.listener):
            if told is not None:
                told(event)

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
        locked = bool(node.children) or self._pool.num_holders(node.block) > 0
        partition = self.tenancy.accounts[node.account].partition
        self.shelves.move(node, partition, len(node.tokens) // TOKEN_BYTES, locked=locked)

    def set_quota(self, tenant: str, floor: int, cap: int | None) -> None:
        """A tenant's floor and cap in blocks; its cached blocks beyond the cap go at once, those in use as they end."""
        known = self.tenancy.partition_of(tenant)
        account = self.tenancy.set_quota(tenant, floor, cap)
        self._version += 1
        if known != account.partition:
            for node in [each for each in self.tree.nodes.values() if each.account == account.index]:
                self._shelve(node, node.priority, anew=True)
            if known:
                self.shelves.drop(known)
        self._keep_cap(account)

    def _keep_cap(self, account: Account) -> None:
        while account.cap is not None and account.used > account.cap and account.cached:
            self._evict([account])

    def advance(self, now_s: float) -> None:
        """Move the cache's clock: leases end, and priorities whose time is over fall back to the default."""
        self.now_s = now_s
        for lease in self.leases.ended(now_s):
            self.unpin(lease.lease_id)
        for node in self.shelves.expired(now_s):
            self._shelve(node, DEFAULT_PRIORITY)

    def pin(self, options: CacheOptions, tokens: array[int], seconds: float) -> Lease:
        """Keep what is published of a text from eviction for so long.

        Raises CapacityError, and changes nothing, where the account's pinned blocks would exceed its cap, or all of
        them half of the cache, and RequestError for a time that is none.
        """
        if not 0 < seconds < 1e9:
            raise RequestError(f"a lease of {seconds} seconds; give a time above 0")
        self.tenancy.check(options)
        account = self.account_of(options)
        nodes = self.chain_of(options, tokens)
        blocks = [node.block for node in nodes]
        fresh = self.leases.num_fresh(blocks)
        most = self._pool.num_blocks // 2
        if account.cap is not None and account.pinned + fresh > account.cap:
            raise CapacityError(
                f"a pin of {fresh} blocks beside {account.pinned} pinned exceeds the cap of tenant {account.name!r}, "
                f"{account.cap} blocks; unpin some or raise its quota"
            )
        if self.leases.num_blocks + fresh > most:
            raise CapacityError(
                f"a pin of {fresh} blocks beside {self.leases.num_blocks} pinned exceeds half of the KV cache ({most} "
                f"blocks); unpin some or raise kv_cache_memory_bytes"
            )
        self.hold(blocks)
        account.pinned += fresh
        num_tokens = sum(len(node.tokens) for node in nodes) // TOKEN_BYTES
        return self.leases.add(blocks, account.index, num_tokens, self.now_s + seconds)

    def unpin(self, lease_id: int) -> bool:
        """End a lease; False where it has ended already."""
        lease = self.leases.remove(lease_id)
        if lease is None:
            return False
        self.tenancy.accounts[lease.account].pinned -= self.leases.num_fresh(lease.blocks)
        self.release(lease.blocks)
        return True

    def purge(self, node: Node) -> int:
        """Drop a node, or all of a root, with everything behind it. Returns blocks dropped; those in use are freed by
        their last holder."""
        nodes = list(self.tree.below(node))
        blocks = {each.block for each in nodes}
        for lease in self.leases.of(blocks):
            self.unpin(lease.lease_id)
            self.leases.num_forced += 1
        for each in nodes:
            if each.alive:  # the end of a lease may have let it go already
                self.discard(each)
        self.lookups.forget(nodes)
        return len(nodes)

    def purge_text(self, options: CacheOptions, tokens: array[int]) -> int:
        """Drop what is published of a text and of no other that goes on from it. Returns blocks dropped."""
        self.tenancy.check(options)
        count = 0
        for node in reversed(self.chain_of(options, tokens)):
            if node.children:
                break
            count += self.purge(node)
        return count

    def purge_prefix(self, options: CacheOptions, tokens: array[int]) -> int:
        """Drop every text that begins with these tokens: blocks that hold their last position or any behind it. What a
        running sequence has not published yet is published as it goes on."""
        self.tenancy.check(options)
        nodes, size = [self._root(options), *self.chain_of(options, tokens)], self.tree.block_size
        if len(nodes) <= len(tokens) // size:
            return 0
        parent = nodes[len(tokens) // size]
        rest = tokens[len(tokens) - len(tokens) % size :].tobytes()
        if not rest and parent.parent is not None:
            return self.purge(parent)
        return sum(self.purge(child) for text, child in list(parent.children.items()) if text.startswith(rest))

    def purge_namespace(self, options: CacheOptions) -> int:
        """Drop every text of the namespace that these options name, its salt included."""
        self.tenancy.check(options)
        count = self.purge(self._root(options))
        namespace = self.tenancy.namespace(options.tenant, options.salt, options.public)
        self.tree.forget_root(namespace, self._config.fingerprint)
        return count

    def purge_tenant(self, tenant: str) -> int:
        """Drop every text of a tenant, whatever its salt, and its secret: its keys are never made again."""
        count = 0
        for namespace, fingerprint, root in self.tree.roots_of(tenant):
            count += self.purge(root)
            self.tree.forget_root(namespace, fingerprint)
        self.secrets.forget(tenant)
        return count

    def remove_tenant(self, tenant: str) -> int:
        """`purge_tenant`, and its quota goes with it. Returns blocks dropped."""
        count = self.purge_tenant(tenant)
        if self.tenancy.is_known(tenant):
            self.set_quota(tenant, 0, None)
            self.tenancy.undeclare(tenant)
        return count

    # What the data plane is to do

    def moves(self) -> Moves:
        """Wipes and copies that must come before the next step computes; the same until `moved`."""
        dirty = self._pool.dirty
        if not dirty and not self._copies:
            return NO_MOVES
        return Moves(tuple(dirty), tuple(self._copies.values()))

    def moved(self, moves: Moves) -> None:
        """The data plane has carried out `moves`."""
        for block in moves.wipes:
            self._pool.dirty.pop(block, None)
        self.num_wiped += len(moves.wipes)
        for copy in moves.copies:
            if self._copies.get(copy.target) is copy:
                del self._copies[copy.target]
                self.release([copy.source])

    def copy_on_write(self, account: Account, source: int, num_positions: int) -> int:
        """A fresh block that will begin with the first positions of `source`, whose holder moves on to it. Raises
        CapacityError, and changes nothing, where there is none."""
        [target] = self.allocate(account, 1)
        self.hold([source])
        self._copies[target] = Copy(source, target, num_positions)
        return target

    def is_copying(self, block: int) -> bool:
        """True where the block has yet to be copied into."""
        return block in self._copies

    def evict_any(self) -> None:
        """Evict a block as for a smaller cache: of who is above a floor, and only then of anyone."""
        self._evict(self.tenancy.to_shrink(self._pool.num_cached))

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Blocks with contents have new ids: old -> new."""
        self._version += 1
        for old, new in moved.items():
            self._owner[new] = self._owner[old]
            node = self.tree.nodes.pop(old, None)
            if node is not None:
                self.tree.nodes[new] = node
                self.shelves.renumber(node, new)
        self.leases.renumber(moved)
        if self.windows is not None:
            self.windows.renumber(moved)

    def set_num_blocks(self, num_blocks: int) -> None:
        """The pool has another size."""
        self._version += 1
        self.tenancy.num_blocks = num_blocks
        del self._owner[num_blocks:]
        self._owner.extend([0] * (num_blocks - len(self._owner)))
        self.shelves.resize(num_blocks)
        self.lookups.resize(KEYS_PER_BLOCK * num_blocks)

    def _evict(self, givers: Iterable[Account | None]) -> None:
        block = self.shelves.victim(0 if each is None else each.partition for each in givers)
        if block is None:
            raise IntegrityError("no cached block can be evicted although the accounts say so; report this as a bug")
        node = self.tree.nodes[block]
        self.lookups.evict(node, self.now_s)
        self.num_evicted += 1
        self.discard(node, evicted=True)

    def _shortage(self, account: Account, count: int) -> CapacityError:
        return account.shortage(count) or self._pool.shortage(count, self.available(account))

    def cap_error(self, count: int, options: CacheOptions) -> CapacityError | None:
        """The error of a text of `count` blocks that its account's cap can never hold, None where it can."""
        return self.account_of(options).never(count)

    def floor_error(self, count: int, options: CacheOptions) -> CapacityError | None:
        """The error of a text of `count` blocks that other accounts' floors leave no room for, None where they do."""
        return self.tenancy.kept_for_others(self.account_of(options), count)

    def check(self) -> None:
        """Look at the next block in turn, in O(1). Raises IntegrityError where pool, tree and accounts contradict each
        other there."""
        pool = self._pool
        block = self._patrol = (self._patrol + 1) % pool.num_blocks
        pool.check_block(block)
        node = self.tree.nodes.get(block)
        if pool.is_published(block) != (node is not None):
            raise IntegrityError(f"block {block} is published in the pool or in the tree, and not in both")
        if node is not None:
            account = self.tenancy.accounts[node.account]
            named = node.block == block and node.alive and self.tree.index.get(node.key) is node
            if not named or node.shelf is None or not 0 <= account.cached <= account.used:
                raise IntegrityError(f"{node} is not what block {block} holds, or {account} is miscounted")

    def rebuild(self) -> None:
        """Drop every text and every hold, whatever state they are in; the pool has been reset. Quotas, public names and
        secrets stay, pins end."""
        self._version += 1
        keys = list(self.tree.index)
        self.tree.clear()
        self.lookups.clear()
        self.tenancy.clear()
        self.leases.clear()
        self._copies.clear()
        if self.windows is not None:
            self.windows.clear()
        self._owner = array("i", bytes(4 * self._pool.num_blocks))
        self.shelves = Shelves(self._config.policy, self._pool.num_blocks, self._config.page_bytes)
        for key in keys:
            self._tell(Removed(key, False))

    def verify(self) -> None:
        """Pool, tree and accounts agree, in O(n), for tests. Raises IntegrityError."""
        verify_blocks(self._pool, self.tree, self.tenancy, self._owner, self._copies)
