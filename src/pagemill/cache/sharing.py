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
from pagemill.cache.entry import Entry, Removed, SharingConfig, Stored
from pagemill.cache.eviction import Shelves
from pagemill.cache.keys import TOKEN_BYTES, Secrets, child_key
from pagemill.cache.leases import Lease, Leases
from pagemill.cache.pool import BlockPool
from pagemill.cache.prefix import Match, PrefixTree
from pagemill.cache.receipt import EvictedKeys, Lookup, Miss
from pagemill.cache.tenancy import Account, Tenancy

EVICTED_KEYS_PER_BLOCK = 4
MOST_EMPTY_ROOTS = 4096


class SharedBlocks:
    """Published blocks over a pool. Mutated by every method that is not a question.

    now_s: time of the last `advance`. on_event: told of each Stored and Removed, in order.
    """

    __slots__ = (
        "_config", "_copies", "_entry", "_owner", "_pool", "_version", "evicted", "leases", "now_s", "num_evicted",
        "on_event", "secrets", "shelves", "tenancy", "tree",
    )  # fmt: skip

    def __init__(self, pool: BlockPool, block_size: int, config: SharingConfig) -> None:
        self._pool = pool
        self._config = config
        self._owner = array("i", bytes(4 * pool.num_blocks))
        self._copies: dict[int, Copy] = {}  # by target
        self._version = 0  # of everything that an entry depends on
        self._entry: tuple[array[int], int, CacheOptions, int, Entry] | None = None
        self.secrets = Secrets()
        self.tree = PrefixTree(block_size, self.secrets)
        self.shelves = Shelves(config.policy, pool.num_blocks, config.page_bytes)
        self.tenancy = Tenancy(pool.num_blocks, known_only=config.known_tenants_only)
        self.evicted = EvictedKeys(EVICTED_KEYS_PER_BLOCK * pool.num_blocks)
        self.leases = Leases()
        self.num_evicted = 0
        self.now_s = 0.0
        self.on_event: Callable[[Stored | Removed], None] | None = None

    # What is there

    def available(self, account: Account) -> int:
        """Blocks that the account could take now."""
        return self.tenancy.available(account, self._pool.num_free, self._pool.num_cached)

    def entry(self, options: CacheOptions, tokens: array[int], num_tokens: int) -> Entry:
        """How a sequence whose known tokens are the first `num_tokens` of `tokens` would enter now. Changes nothing but
        opening an account or a root; raises RequestError as `Tenancy.namespace` does."""
        last = self._entry
        if last is not None and last[0] is tokens and last[1:4] == (num_tokens, options, self._version):
            return last[4]
        entry = self._find_entry(options, tokens, num_tokens)
        self._entry = (tokens, num_tokens, options, self._version, entry)
        return entry

    def _find_entry(self, options: CacheOptions, tokens: array[int], num_tokens: int) -> Entry:
        namespace = self.tenancy.namespace(options.tenant, options.salt, options.public)
        account = self.tenancy.account(namespace)
        size = self.tree.block_size
        count = -(-num_tokens // size)
        self.tree.drop_empty_roots(MOST_EMPTY_ROOTS)
        root = self.tree.root(namespace, self._config.fingerprint)
        room = self.tenancy.room(account, self._pool.num_free, self._pool.num_cached)
        most = num_tokens - 1
        if options.bypass or most < 1:
            miss = Miss("bypassed", 0) if options.bypass else None
            lookup = Lookup(max(most, 0), miss=miss)
            return Entry(account, root, root, [], None, 0, count, self.available(account), room, lookup, [])
        data = tokens[:num_tokens].tobytes()
        match = self.tree.find(root, data, most)
        shared = [node.block for node in match.nodes]
        revived = sum(1 for block in shared if not self._pool.num_holders(block))
        spare, room = self.available(account) - revived, room - revived
        num_new = count - len(shared)
        tail, num_tail = match.tail, match.num_tail_tokens
        if tail is not None and not self._pool.num_holders(tail.block):
            if spare - 1 >= num_new:
                spare, room = spare - 1, room - 1
            elif spare >= num_new:  # the source would have to go to make room for its own copy
                tail, num_tail = None, 0
        num_hit = len(shared) * size + num_tail
        missing = self._missing_keys(match, data, most)
        miss = None if num_hit == most else self._miss(options, match, data, num_hit, most, missing)
        node = match.nodes[-1] if match.nodes else root
        lookup = Lookup(most, num_hit, num_hit, miss)
        return Entry(account, root, node, shared, tail, num_tail, num_new, spare, room, lookup, missing)

    def _missing_keys(self, match: Match, data: bytes, most: int) -> list[bytes]:
        size = self.tree.block_size * TOKEN_BYTES
        key = match.nodes[-1].key if match.nodes else match.root.key
        found = []
        for at in range(len(match.nodes) * size, most * TOKEN_BYTES - size + 1, size):
            key = child_key(key, data[at : at + size])
            found.append(key)
        return found

    def _miss(
        self, options: CacheOptions, match: Match, data: bytes, num_hit: int, most: int, missing: list[bytes]
    ) -> Miss:
        """Why position `num_hit` was not found; from this namespace's own memory alone."""
        when = self.evicted.when(missing[0]) if missing else None
        if when is not None:
            return Miss("evicted", num_hit, max(self.now_s - when, 0.0), self.shelves.policy)
        namespace = self.tenancy.namespace(options.tenant, options.salt, options.public)
        for root in self.tree.siblings_of(namespace, self._config.fingerprint):
            other = self.tree.find(root, data, most)
            if len(other.nodes) * self.tree.block_size + other.num_tail_tokens > num_hit:
                return Miss("other format", num_hit)
        last = match.nodes[-1] if match.nodes else match.root
        follows = match.tail is None or len(match.tail.tokens) > TOKEN_BYTES * match.num_tail_tokens
        return Miss("differs" if last.children and follows else "not seen", num_hit)

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

    def enter(self, entry: Entry) -> array[int]:
        """Take what `entry` names: hold the hits, copy the tail, allocate the rest. Returns the block table.

        Raises CapacityError, and changes nothing, where blocks are short.
        """
        if entry.num_new > max(entry.num_spare, 0):
            raise self._shortage(entry.account, entry.num_new)
        for node in reversed(self.tree.chain(entry.node)):
            assert node.shelf is not None
            node.shelf.touch(node.block)
        self.hold(entry.shared)
        tail = entry.tail
        if tail is not None:
            assert tail.shelf is not None
            tail.shelf.touch(tail.block)
            self.hold([tail.block])
        for key in entry.missing:
            self.shelves.on_miss(key, entry.account.partition)
        table = array("i", entry.shared)
        table.extend(self.allocate(entry.account, entry.num_new))
        if tail is not None:
            target = table[len(entry.shared)]
            self._copies[target] = Copy(tail.block, target, entry.num_tail_tokens)
        return table

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
            self._evict(self.tenancy.givers(account))
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
                assert node.shelf is not None
                node.shelf.lock(block)

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
                    assert node.shelf is not None
                    node.shelf.unlock(block)
            else:
                account.used -= 1
                if self._copies and block in self._copies:
                    self.release([self._copies.pop(block).source])
        for account in above:  # its cap was lowered while these were in use
            self._keep_cap(account)

    # Publication

    def publish(self, parent: Node, block: int, tokens: bytes, key: bytes | None, retain: Retain | None) -> Node:
        """Let a held block be found behind `parent`. What its tokens begin with and nobody holds makes way for it."""
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
            parent.shelf.lock(parent.block)
        partition = self.tenancy.accounts[node.account].partition
        self.shelves.insert(node, partition, len(tokens) // TOKEN_BYTES, locked=True)
        if shorter is not None and not self._pool.num_holders(shorter.block):
            self.discard(shorter)
        if self.on_event is not None:
            self.on_event(Stored(node.key, parent.key, block, len(tokens) // TOKEN_BYTES))
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
        if parent.shelf is not None and not parent.children and not self._pool.num_holders(parent.block):
            parent.shelf.unlock(parent.block)
        if self.on_event is not None:
            self.on_event(Removed(node.key, evicted))

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
        account = self.tenancy.set_quota(tenant, floor, cap)
        self._version += 1
        partition = account.index + 1 if self.tenancy.own_partition(account) else 0
        if partition != account.partition:
            account.partition = partition
            for node in [each for each in self.tree.nodes.values() if each.account == account.index]:
                self._shelve(node, node.priority, anew=True)
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
        nodes = self.chain_of(options, tokens)
        blocks = [node.block for node in nodes]
        account = self.tenancy.account(self.tenancy.namespace(options.tenant, options.salt, options.public))
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
        self.evicted.forget([each.key for each in nodes])
        return len(nodes)

    def purge_text(self, options: CacheOptions, tokens: array[int]) -> int:
        """Drop what is published of a text and of no other that goes on from it. Returns blocks dropped."""
        count = 0
        for node in reversed(self.chain_of(options, tokens)):
            if node.children:
                break
            count += self.purge(node)
        return count

    def purge_prefix(self, options: CacheOptions, tokens: array[int]) -> int:
        """Drop every text that begins with these tokens: blocks that hold their last position or any behind it. What a
        running sequence has not published yet is published as it goes on."""
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
        namespace = self.tenancy.namespace(options.tenant, options.salt, options.public)
        count = self.purge(self._root(options))
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
        self._evict(self.tenancy.above_floors() or [a for a in self.tenancy.accounts if a.partition])

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Blocks in use have new ids: old -> new."""
        self._version += 1
        for old, new in moved.items():
            self._owner[new] = self._owner[old]
            node = self.tree.nodes.pop(old, None)
            if node is not None:
                shelf = node.shelf
                assert shelf is not None
                shelf.remove(old, False)
                node.block = new
                self.tree.nodes[new] = node
                partition = self.tenancy.accounts[node.account].partition
                self.shelves.insert(node, partition, len(node.tokens) // TOKEN_BYTES, locked=True)
        self.leases.renumber(moved)

    def set_num_blocks(self, num_blocks: int) -> None:
        """The pool has another size."""
        self._version += 1
        self.tenancy.num_blocks = num_blocks
        del self._owner[num_blocks:]
        self._owner.extend([0] * (num_blocks - len(self._owner)))

    def _evict(self, givers: Iterable[Account | None]) -> None:
        block = self.shelves.victim(0 if each is None else each.partition for each in givers)
        if block is None:
            raise IntegrityError("no cached block can be evicted although the accounts say so; report this as a bug")
        node = self.tree.nodes[block]
        self.evicted.add(node.key, self.now_s)
        self.num_evicted += 1
        self.discard(node, evicted=True)

    def _shortage(self, account: Account, count: int) -> CapacityError:
        if account.cap is not None and count > account.cap - account.used + account.cached:
            return CapacityError(
                f"{count} blocks of the KV cache are needed; tenant {account.name!r} may have {account.cap} and uses "
                f"{account.used}; raise its quota or run fewer or shorter sequences",
                retry_after_s=1.0,
            )
        return self._pool.shortage(count, self.available(account))

    def cap_error(self, count: int, options: CacheOptions) -> CapacityError | None:
        """The error of a text of `count` blocks that its account's cap can never hold, None where it can."""
        account = self.tenancy.account(self.tenancy.namespace(options.tenant, options.salt, options.public))
        if account.cap is None or count <= account.cap:
            return None
        return CapacityError(
            f"the sequence needs {count} blocks of the KV cache and tenant {account.name!r} may have {account.cap}; "
            f"shorten it or raise the tenant's quota"
        )

    def verify(self) -> None:
        """Pool, tree and accounts agree, in O(n), for tests. Raises IntegrityError."""
        self.tree.verify()
        pool = self._pool
        published = {block for block in range(pool.num_blocks) if pool.is_published(block)}
        if published != set(self.tree.nodes):
            raise IntegrityError(f"published blocks {sorted(published)} are not the tree's {sorted(self.tree.nodes)}")
        used = [0] * len(self.tenancy.accounts)
        cached = list(used)
        for block in range(pool.num_blocks):
            if pool.num_holders(block) or block in published:
                used[self._owner[block]] += 1
                cached[self._owner[block]] += not pool.num_holders(block)
        for account in self.tenancy.accounts:
            if (account.used, account.cached) != (used[account.index], cached[account.index]):
                raise IntegrityError(f"{account} counts other than {used[account.index]}, {cached[account.index]}")
            if account.cap is not None and account.used > account.cap and account.cached:
                raise IntegrityError(f"{account} is above its cap and holds cached blocks")
        for target, copy in self._copies.items():
            if not pool.num_holders(copy.source) or not pool.num_holders(target) or copy.target != target:
                raise IntegrityError(f"{copy} names a block that nobody holds")
