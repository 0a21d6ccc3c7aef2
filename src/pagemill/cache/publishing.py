"""What of a running sequence can be found by others: its full blocks, its tail, and what a rollback takes back. Owns
the rules, not the sequences.

    blocks of a table   | hit, shared ... | copied tail, own ... own | own, not full |
                        |  published, never written | published when full
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from pagemill.base.errors import CapacityError
from pagemill.base.params import Retain
from pagemill.cache.block import Node
from pagemill.cache.curve import ReuseCurve
from pagemill.cache.keys import TOKEN_BYTES
from pagemill.cache.pool import BlockPool
from pagemill.cache.residents import Departure
from pagemill.cache.sequences import NEVER, SequenceBlocks
from pagemill.cache.sharing import SharedBlocks


class Publisher:
    """Publishes sequences in a tree. Mutates the sequences that it is given and what is shared; has no state.

    curve: is told of blocks that no look-up asked for.
    """

    __slots__ = ("_curve", "_pool", "_shared", "_size")

    def __init__(self, shared: SharedBlocks, pool: BlockPool, block_size: int, curve: ReuseCurve) -> None:
        self._shared = shared
        self._pool = pool
        self._size = block_size
        self._curve = curve

    def publish(self, sequence: SequenceBlocks) -> None:
        """Publish every full block that is not yet. One that another sequence has published is exchanged for that."""
        size, first = self._size, sequence.publish_at // self._size - 1
        edges = self._edges(sequence, first, sequence.committed // size)
        while sequence.publish_at <= sequence.committed:
            index, node = sequence.publish_at // size - 1, sequence.node
            assert node is not None
            if not node.alive:  # its beginning was purged: nothing can be found behind it
                sequence.tokens, sequence.publish_at = None, NEVER
                return
            self._take_back_tail(sequence)
            there = node.child(edges[index - first])
            if there is None:  # nor is there anything behind it
                self._publish_from(sequence, node, index, edges[index - first :])
                return
            self._exchange(sequence, index, there)
            sequence.node = there
            sequence.publish_at += size

    def _edges(self, sequence: SequenceBlocks, first: int, end: int) -> Ordered[bytes]:
        """Tokens of the sequence's blocks first .. end-1, packed."""
        at = first - sequence.first_missing
        known = sequence.edges[at : at + end - first] if at >= 0 else ()
        first += len(known)
        if first == end:
            return known
        assert sequence.tokens is not None
        data, step = sequence.tokens[first * self._size : end * self._size].tobytes(), self._size * TOKEN_BYTES
        return [*known, *[data[at : at + step] for at in range(0, len(data), step)]]

    def _publish_from(self, sequence: SequenceBlocks, node: Node, index: int, edges: Ordered[bytes]) -> None:
        """Publish the blocks from `index` on behind `node`, whose tokens are `edges`."""
        size, end = self._size, index + len(edges)
        at = index - sequence.first_missing
        keys = sequence.missing[at : at + len(edges)] if at >= 0 else ()
        wishes = (
            [_wish(sequence, each * size, (each + 1) * size) for each in range(index, end)] if sequence.retain else ()
        )
        nodes = self._shared.publish(node, sequence.table[index:end], edges, keys, wishes, _text_of(sequence))
        for each in nodes[len(keys) :]:
            self._curve.insert(each.key)
        sequence.node = nodes[-1]
        sequence.publish_at += len(edges) * size

    def _exchange(self, sequence: SequenceBlocks, index: int, there: Node) -> None:
        """Have a sequence read a block that another one has published, instead of its own with the same tokens."""
        shared, table = self._shared, sequence.table
        shared.hold([there.block])
        if shared.windows is not None:
            shared.windows.exchange(table[index], there.block)
        shared.release([table[index]])
        table[index] = there.block
        self.retain(sequence, there)

    def publish_tail(self, sequence: SequenceBlocks) -> None:
        """Let what is committed be found to its last token. What is written behind that is the sequence's own; whoever
        hits the tail copies it."""
        shared, node, tokens = self._shared, sequence.node, sequence.tokens
        if node is None or tokens is None or not node.alive:
            return
        start = sequence.publish_at - self._size
        if sequence.committed <= start or shared.is_copying(sequence.table[start // self._size]):
            return
        data = tokens[start : sequence.committed].tobytes()
        if shared.tree.extended_by(node, data) is not None:
            return
        self._take_back_tail(sequence)
        wishes = [_wish(sequence, start, sequence.committed)] if sequence.retain else ()
        block = sequence.table[start // self._size]
        [sequence.tail] = shared.publish(node, [block], [data], (), wishes, _text_of(sequence))

    def roll_back(self, sequence: SequenceBlocks, num_tokens: int) -> None:
        """Leave the published blocks that reach beyond `num_tokens`; the one it lies within becomes the sequence's own,
        by a copy where others read it. Raises CapacityError, and changes nothing, where there is no block for that."""
        shared, size, account = self._shared, self._size, sequence.account
        assert account is not None
        copies = self.must_copy(sequence, num_tokens)
        if copies and shared.available(account) < 1:
            raise CapacityError("a rollback needs one block of the KV cache and none is free", retry_after_s=1.0)
        if (
            sequence.tail is not None
            and num_tokens < sequence.publish_at - size + len(sequence.tail.tokens) // TOKEN_BYTES
        ):
            self._take_back_tail(sequence, "rollback")
        whole, node = num_tokens // size, sequence.node
        while node is not None and node.depth >= whole and node.parent is not None:
            last, node = node, node.parent
            if last.depth == whole and num_tokens % size and not copies and last.alive:
                shared.discard(last, "rollback")
        sequence.node = node
        if copies:
            source = sequence.table[whole]
            target = sequence.table[whole] = shared.copy_on_write(account, source, num_tokens % size)
            if shared.windows is not None:
                shared.windows.copy_on_write(source, target, num_tokens % size)
            shared.release([source])
        if sequence.tokens is not None:
            sequence.publish_at = (whole + 1) * size

    def can_rewind(self, sequence: SequenceBlocks, num_tokens: int) -> bool:
        """True where a sequence that holds pages of window groups can go back to so many tokens: from where they still
        have what it reads, the rest is to be computed again."""
        windows, account = self._shared.windows, sequence.account
        assert windows is not None
        assert account is not None
        kept, count = windows.longest(sequence.table, num_tokens), -(-num_tokens // self._size)
        copies = int(self.must_copy(sequence, kept))
        need = count - kept // self._size if kept < num_tokens else 0
        return need + copies <= self._shared.available(account) and windows.fits(sequence, kept, count, copies)

    def must_copy(self, sequence: SequenceBlocks, num_tokens: int) -> bool:
        """True where the block that `num_tokens` ends in is published and others hold or follow it."""
        node, whole = sequence.node, num_tokens // self._size
        if node is None or node.depth < whole or not num_tokens % self._size:
            return False
        return node.depth > whole or bool(node.below) or self._pool.num_holders(sequence.table[whole]) > 1

    def retain(self, sequence: SequenceBlocks, node: Node) -> None:
        """Give a block that the sequence hit or wrote the priority that its request asks for."""
        start = node.depth * self._size
        wish = _wish(sequence, start, start + self._size) if sequence.retain else None
        if wish is not None:
            self._shared.retain(node, wish)

    def _take_back_tail(self, sequence: SequenceBlocks, reason: Departure = "replaced") -> None:
        if sequence.tail is not None:
            if sequence.tail.alive:
                self._shared.discard(sequence.tail, reason)
            sequence.tail = None


def _text_of(sequence: SequenceBlocks) -> tuple[int, int]:
    """What policies are told of the text that a block came in with. Its length is cut to its two highest bits: they
    need no more of it, and many texts have it in common."""
    assert sequence.tokens is not None
    length = len(sequence.tokens)
    shift = max(length.bit_length() - 2, 0)
    return length >> shift << shift, min(sequence.first_missing, 2)


def _wish(sequence: SequenceBlocks, start: int, end: int) -> Retain | None:
    """The highest priority that the request asked for any of these positions."""
    wishes = [each for each in sequence.retain if each.start < end and start < each.end]
    return max(wishes, key=lambda each: each.priority, default=None)
