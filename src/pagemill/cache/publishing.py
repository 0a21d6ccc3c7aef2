"""What of a running sequence can be found by others: its full blocks, its tail, and what a rollback takes back. Owns
the rules, not the sequences.

    blocks of a table   | hit, shared ... | copied tail, own ... own | own, not full |
                        |  published, never written | published when full
"""

from __future__ import annotations

from pagemill.base.errors import CapacityError
from pagemill.base.params import Retain
from pagemill.cache.block import Node
from pagemill.cache.curve import ReuseCurve
from pagemill.cache.keys import TOKEN_BYTES
from pagemill.cache.pool import BlockPool
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
        shared, size, tokens, table = self._shared, self._size, sequence.tokens, sequence.table
        assert tokens is not None
        text = (_rounded(len(tokens)), min(sequence.first_missing, 2))
        while sequence.publish_at <= sequence.committed:
            end, node = sequence.publish_at, sequence.node
            assert node is not None
            if not node.alive:  # its beginning was purged: nothing can be found behind it
                sequence.tokens, sequence.publish_at = None, NEVER
                return
            index = end // size - 1
            data = tokens[end - size : end].tobytes()
            self._take_back_tail(sequence)
            there = node.children.get(data)
            if there is None:
                missing = index - sequence.first_missing
                key = sequence.missing[missing] if 0 <= missing < len(sequence.missing) else None
                wish = _wish(sequence, end - size, end) if sequence.retain else None
                there = shared.publish(node, table[index], data, key, wish, text)
                if key is None:
                    self._curve.insert(there.key)
            else:
                shared.hold([there.block])
                if shared.windows is not None:
                    shared.windows.exchange(table[index], there.block)
                shared.release([table[index]])
                table[index] = there.block
                self.retain(sequence, there)
            sequence.node = there
            sequence.publish_at = end + size

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
        wish = _wish(sequence, start, sequence.committed) if sequence.retain else None
        text = (_rounded(len(tokens)), min(sequence.first_missing, 2))
        sequence.tail = shared.publish(node, sequence.table[start // self._size], data, None, wish, text)

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
            self._take_back_tail(sequence)
        whole, node = num_tokens // size, sequence.node
        while node is not None and node.depth >= whole and node.parent is not None:
            last, node = node, node.parent
            if last.depth == whole and num_tokens % size and not copies and last.alive:
                shared.discard(last)
        sequence.node = node
        if copies:
            source = sequence.table[whole]
            target = sequence.table[whole] = shared.copy_on_write(account, source, num_tokens % size)
            if shared.windows is not None:
                shared.windows.copy_on_write(source, target, num_tokens % size)
            shared.release([source])
        if sequence.tokens is not None:
            sequence.publish_at = (whole + 1) * size

    def must_copy(self, sequence: SequenceBlocks, num_tokens: int) -> bool:
        """True where the block that `num_tokens` ends in is published and others hold or follow it."""
        node, whole = sequence.node, num_tokens // self._size
        if node is None or node.depth < whole or not num_tokens % self._size:
            return False
        return node.depth > whole or bool(node.children) or self._pool.num_holders(sequence.table[whole]) > 1

    def retain(self, sequence: SequenceBlocks, node: Node) -> None:
        """Give a block that the sequence hit or wrote the priority that its request asks for."""
        start = node.depth * self._size
        wish = _wish(sequence, start, start + self._size) if sequence.retain else None
        if wish is not None:
            self._shared.retain(node, wish)

    def _take_back_tail(self, sequence: SequenceBlocks) -> None:
        if sequence.tail is not None:
            if sequence.tail.alive:
                self._shared.discard(sequence.tail)
            sequence.tail = None


def _rounded(length: int) -> int:
    """A length cut to its two highest bits: policies need no more of it, and many texts have it in common."""
    shift = max(length.bit_length() - 2, 0)
    return length >> shift << shift


def _wish(sequence: SequenceBlocks, start: int, end: int) -> Retain | None:
    """The highest priority that the request asked for any of these positions."""
    wishes = [each for each in sequence.retain if each.start < end and start < each.end]
    return max(wishes, key=lambda each: each.priority, default=None)
