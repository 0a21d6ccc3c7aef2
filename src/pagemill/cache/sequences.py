"""One sequence's blocks and lengths, and what must hold for all of them. The manager changes them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from pagemill.base.errors import IntegrityError
from pagemill.base.params import Retain
from pagemill.cache.block import Node
from pagemill.cache.pool import BlockPool
from pagemill.cache.sharing import SharedBlocks
from pagemill.cache.tenancy import Account

NEVER = 1 << 62  # a length that no sequence reaches


@dataclass(slots=True)
class SequenceBlocks:
    """Blocks and lengths of one sequence. Mutated by CacheManager alone.

    tokens: the caller's, of which positions below `committed` are final; None where nothing is to be published. node:
    of its last published whole block, or the root. publish_at: length at which the next block is full. tail: node of
    the beginning of its part-filled block, where that was published. root: where its text begins. first_read: by window
    group, index of the first block that it holds a page of; num_paged: that behind the last one; reserved: by window
    group, pages that it may come to hold. missing: keys of the prompt's blocks from index
    first_missing on; edges: their tokens, packed.
    """

    table: array[int] = field(default_factory=lambda: array("i"))
    committed: int = 0
    history: int = 0
    publish_at: int = NEVER
    account: Account | None = None
    tokens: array[int] | None = None
    node: Node | None = None
    tail: Node | None = None
    retain: tuple[Retain, ...] = ()
    root: Node | None = None
    first_read: list[int] = field(default_factory=list)
    num_paged: int = 0
    reserved: list[int] = field(default_factory=list)
    missing: Ordered[bytes] = ()
    edges: Ordered[bytes] = ()
    first_missing: int = 0


def verify_sequences(
    sequences: Mapping[int, SequenceBlocks], pool: BlockPool, shared: SharedBlocks | None, mode: str, block_size: int
) -> tuple[int, int]:
    """Lengths, tables and holders agree, in O(num_blocks). Returns entries of all tables and positions granted. Raises
    IntegrityError."""
    holders: Counter[int] = Counter()
    num_owned = num_positions = 0
    for seq_id, sequence in sequences.items():
        capacity = len(sequence.table) * block_size
        ordered = 0 <= sequence.committed <= sequence.history <= capacity
        wasteful = mode != "contiguous" and capacity - sequence.history >= block_size
        if not ordered or wasteful or len(set(sequence.table)) != len(sequence.table):
            raise IntegrityError(f"sequence {seq_id} breaks its lengths or shares blocks: {sequence}")
        if sequence.tokens is not None and shared is not None:
            _verify_chain(shared, seq_id, sequence, block_size)
        holders.update(sequence.table)
        num_owned += len(sequence.table)
        num_positions += sequence.history
    if shared is not None:
        holders.update(shared.held_blocks())
    elif holders and max(holders.values()) > 1:
        raise IntegrityError(f"a block has two owners: {holders.most_common(1)}")
    for block in range(pool.num_blocks):
        if pool.num_holders(block) != holders[block]:
            raise IntegrityError(f"block {block} has {holders[block]} owners and {pool.num_holders(block)} holders")
    return num_owned, num_positions


def _verify_chain(shared: SharedBlocks, seq_id: int, sequence: SequenceBlocks, size: int) -> None:
    """Published blocks of a sequence hold its own tokens, and what it will write next is its own alone."""
    assert sequence.tokens is not None
    assert sequence.node is not None
    chain = shared.tree.chain(sequence.node)
    for node, block in zip(chain, sequence.table, strict=False):
        tokens = sequence.tokens[node.depth * size : (node.depth + 1) * size].tobytes()
        if node.tokens != tokens or (node.alive and node.block != block):
            raise IntegrityError(f"sequence {seq_id} holds {block} where {node} is published")
    if len(chain) * size > sequence.committed or sequence.publish_at != (len(chain) + 1) * size:
        raise IntegrityError(f"sequence {seq_id} published more or less than it committed: {sequence}")
    for block in sequence.table[len(chain) :]:
        node_of_tail = shared.tree.nodes.get(block)
        if node_of_tail is not None and node_of_tail is not sequence.tail:
            raise IntegrityError(f"sequence {seq_id} writes to block {block}, which is published")
