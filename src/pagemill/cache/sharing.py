"""What a text finds of the blocks that are there, what it takes, and what keeps or drops texts by name.

The manager owns sequences and their lengths; what it takes, publishes and gives back passes through here. How blocks
come and go is `residents.py`; this adds look-ups, quotas, pins, purges and what the data plane is to do.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pagemill.base.errors import CapacityError, IntegrityError, RequestError
from pagemill.base.params import CacheOptions
from pagemill.base.transfer import NO_MOVES, Copy, Moves
from pagemill.cache.block import DEFAULT_PRIORITY, Node
from pagemill.cache.entry import Entered, Entry, Removed, SharingConfig
from pagemill.cache.eviction import Shelves
from pagemill.cache.keys import TOKEN_BYTES
from pagemill.cache.leases import Lease, Leases
from pagemill.cache.pool import BlockPool
from pagemill.cache.residents import KEYS_PER_BLOCK, ResidentBlocks
from pagemill.cache.tenancy import Account
from pagemill.cache.verification import verify_blocks

if TYPE_CHECKING:
    from pagemill.cache.sequences import SequenceBlocks


class SharedBlocks(ResidentBlocks):
    """Published blocks over a pool. Mutated by every method that is not a question.

    on_used: told of the nodes that a sequence found, first to last. num_asked, num_hit: tokens looked for and found so
    far, at index 0 by requests that enter for the first time, at 1 by sequences put off and by further choices.
    """

    __slots__ = ("_entry", "_patrol", "leases", "num_asked", "num_hit", "on_used")

    def __init__(self, pool: BlockPool, block_size: int, config: SharingConfig) -> None:
        super().__init__(pool, block_size, config)
        self._patrol = 0  # the block that `check` looks at next
        self._entry: tuple[array[int], int, CacheOptions, int, Entry] | None = None
        self.leases = Leases()
        self.num_asked, self.num_hit = [0, 0], [0, 0]
        self.on_used: Callable[[Sequence[Node]], None] | None = None

    # What is there

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
            for namespace, fingerprint, root in self.tree.roots_of(account.tenant, public=account.public):
                self.tree.forget_root(namespace, fingerprint)
                self.lookups.forget([root])
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

    def chain_of(self, options: CacheOptions, tokens: array[int], *, covering: bool = False) -> list[Node]:
        """The published nodes of a text, as far as they go: whole blocks, and a tail that the text holds whole.
        covering: or a tail that holds the rest of the text, whatever follows there."""
        match = self.tree.find(self._root(options), tokens.tobytes(), len(tokens))
        if match.tail is None:
            return match.nodes
        whole = len(match.tail.tokens) == TOKEN_BYTES * match.num_tail_tokens
        covers = covering and self.tree.num_tokens(match) == len(tokens)
        return [*match.nodes, match.tail] if whole or covers else match.nodes

    # Blocks in and out

    def enter(self, entry: Entry, again: bool = False) -> Entered:
        """Take what `entry` names: hold the hits, copy the tail, allocate the rest. again: see `num_asked`.

        Raises CapacityError, and changes nothing, where blocks are short.
        """
        if entry.num_new > max(entry.num_spare, 0):
            raise self._shortage(entry.account, entry.num_new)
        missing, edges = self.lookups.missing(entry)
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
        self.num_asked[again] += lookup.num_asked
        self.num_hit[again] += lookup.num_hit
        return Entered(table, lookup, missing, edges)

    def can_take(self, sequence: SequenceBlocks, count: int) -> bool:
        """True where the sequence could have so many more blocks now."""
        assert sequence.account is not None
        return count <= self.available(sequence.account) and self._has_pages(sequence, count)

    def _has_pages(self, sequence: SequenceBlocks, count: int) -> bool:
        """The same, of pages of window groups."""
        windows = self.windows
        return windows is None or windows.fits(sequence, sequence.committed, len(sequence.table) + count)

    def grow(self, sequence: SequenceBlocks, count: int) -> None:
        """Give the sequence so many more blocks. Raises CapacityError, and changes nothing, where that cannot be."""
        assert sequence.account is not None
        if not self._has_pages(sequence, count):
            raise CapacityError(
                f"{count} blocks of the KV cache need pages of layers that read a window, and too few are free; raise "
                f"kv_cache_memory_bytes or run fewer sequences (max_num_seqs)",
                retry_after_s=1.0,
            )
        sequence.table.extend(self.allocate(sequence.account, count))
        if self.windows is not None:
            self.windows.grow(sequence)

    def reach(self, sequence: SequenceBlocks, num_tokens: int) -> tuple[array[int], ...]:
        """Take the pages of window groups for a step that computes the sequence up to so many tokens. Returns its
        tables of pages, by group."""
        windows = self.windows
        assert windows is not None
        self._version += windows.reach(sequence, num_tokens)
        return tuple(windows.table(sequence, index) for index in range(len(windows.groups)))

    def move_on(self, sequence: SequenceBlocks) -> None:
        """The sequence has committed more, and lets go of pages that its next token does not read."""
        assert self.windows is not None
        self._version += self.windows.move_on(sequence)

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

    def advance(self, now_s: float) -> None:
        """Move the cache's clock: leases end, and priorities whose time is over fall back to the default."""
        self.now_s = now_s
        for lease in self.leases.ended(now_s):
            self.unpin(lease.lease_id)
        for node in self.shelves.expired(now_s):
            self._shelve(node, DEFAULT_PRIORITY)

    def pin(self, options: CacheOptions, tokens: array[int], seconds: float) -> Lease:
        """Keep what is published of a text from eviction for so long: whole blocks, and the one behind them where it
        covers the rest of the text or ends within it, unless a running sequence still writes it.

        Raises CapacityError, and changes nothing, where the account's pinned blocks would exceed its cap, or all of
        them half of the cache, and RequestError for a time that is none, or where nothing of the text is there.
        """
        if not 0 < seconds < 1e9:
            raise RequestError(f"a lease of {seconds} seconds; give a time above 0")
        self.tenancy.check(options)
        account = self.account_of(options)
        nodes = self.chain_of(options, tokens, covering=True)
        if nodes and len(nodes[-1].tokens) < TOKEN_BYTES * self.tree.block_size and self._is_written(nodes[-1]):
            nodes = nodes[:-1]
        if not nodes:
            raise RequestError(
                "nothing of this text is in the cache of its tenant and salt; generate it first (max_tokens 1 will do) "
                "with the same ones, then pin it"
            )
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
        num_tokens = min(sum(len(node.tokens) for node in nodes) // TOKEN_BYTES, len(tokens))
        return self.leases.add(blocks, account.index, num_tokens, self.now_s + seconds)

    def _is_written(self, tail: Node) -> bool:
        """Whether a sequence holds a part-filled block: its writer, since those who find it copy it."""
        return self._pool.num_holders(tail.block) > self.leases.num_of(tail.block)

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
                self.discard(each, "purge")
        self.lookups.forget([node, *nodes])
        self._let_go()
        return len(nodes)

    def _let_go(self) -> None:
        """Nothing is kept of blocks that are gone."""
        self.shelves.forget_dead()
        self._entry = None

    def purge_text(self, options: CacheOptions, tokens: array[int]) -> int:
        """Drop what is published of a text and of no other that goes on from it. A pinned text is one that does, up to
        its end; a pin of the very text ends. Returns blocks dropped."""
        self.tenancy.check(options)
        count = 0
        for node in reversed(self.chain_of(options, tokens)):
            if node.below or self.leases.ends_at(node.block, len(tokens)):
                break
            count += self.purge(node)
        self.lookups.forget_text(self._root(options), tokens)
        self._let_go()
        return count

    def purge_prefix(self, options: CacheOptions, tokens: array[int]) -> int:
        """Drop every text that begins with these tokens: blocks that hold their last position or any behind it. What a
        running sequence has not published yet is published as it goes on."""
        self.tenancy.check(options)
        nodes, size = [self._root(options), *self.chain_of(options, tokens)], self.tree.block_size
        self.lookups.forget_prefix(nodes[0], tokens)
        self._let_go()
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
        """Drop every text of a tenant, whatever its salt, and its secret: its keys are never made again. Raises
        RequestError where only known tenants may enter, and this one is not known and has left nothing either."""
        roots, count = self.tree.roots_of(tenant), 0
        self.secrets.forget(tenant)
        if not roots:
            self.tenancy.check(CacheOptions(tenant))
        for namespace, fingerprint, root in roots:
            count += self.purge(root)
            self.tree.forget_root(namespace, fingerprint)
        return count

    def remove_tenant(self, tenant: str) -> int:
        """`purge_tenant`, and its quota goes with it. Returns blocks dropped; raises as that does."""
        count = self.purge_tenant(tenant)
        if self.tenancy.is_known(tenant):
            self.set_quota(tenant, 0, None)
            self.tenancy.undeclare(tenant)
        return count

    # What the data plane is to do

    def moves(self) -> Moves:
        """Wipes and copies that must come before the next step computes; the same until `moved`."""
        dirty, windows = self._pool.dirty, () if self.windows is None else self.windows.moves()
        if not dirty and not self._copies and not windows:
            return NO_MOVES
        return Moves(tuple(dirty), tuple(self._copies.values()), windows)

    def moved(self, moves: Moves) -> None:
        """The data plane has carried out `moves`."""
        for block in moves.wipes:
            self._pool.dirty.pop(block, None)
        self.num_wiped += len(moves.wipes)
        for copy in moves.copies:
            if self._copies.get(copy.target) is copy:
                del self._copies[copy.target]
                self.release([copy.source])
        if self.windows is not None and moves.windows:
            self._version += 1
            self.windows.moved(moves.windows)

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
            named = node.block == block and node.alive and self.tree.is_child(node)
            if not named or node.shelf is None or not 0 <= account.cached <= account.used:
                raise IntegrityError(f"{node} is not what block {block} holds, or {account} is miscounted")

    def rebuild(self) -> None:
        """Drop every text and every hold, whatever state they are in; the pool has been reset. Quotas, public names and
        secrets stay, pins end."""
        self._version += 1
        keys = list(self.tree.index)
        self.num_left["quarantine"] += len(keys)
        self._entry = None
        self.tree.clear()
        self.lookups.clear()
        self.tenancy.clear()
        self.leases.clear()
        self._copies.clear()
        if self.windows is not None:
            self.windows.clear()
        self._owner = array("i", bytes(4 * self._pool.num_blocks))
        config = self._config
        self.shelves = Shelves(config.policy, self._pool.num_blocks, config.page_bytes, config.makers)
        for key in keys:
            self._tell(Removed(key, False))

    def verify(self) -> None:
        """Pool, tree and accounts agree, in O(n), for tests. Raises IntegrityError."""
        verify_blocks(self._pool, self.tree, self.tenancy, self._owner, self._copies)
