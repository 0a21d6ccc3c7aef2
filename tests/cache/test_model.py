"""Pool and manager against slow models: random operations, equal answers, invariants after each."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagemill.base.errors import CapacityError, IntegrityError
from pagemill.cache.manager import CacheManager, CacheMode
from pagemill.cache.pool import BlockPool

SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)


class PoolMachine(RuleBasedStateMachine):
    """The pool against a list of reference counts."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.refs = [0] * num_blocks

    @rule(count=st.integers(0, 13), run=st.booleans())
    def allocate(self, count: int, run: bool) -> None:
        free = "".join("1" if refs else "0" for refs in self.refs)
        possible = "0" * count in free if run else free.count("0") >= count
        assert (self.pool.can_allocate_run(count) if run else self.pool.can_allocate(count)) == possible
        try:
            blocks = self.pool.allocate_run(count) if run else self.pool.allocate(count)
        except CapacityError:
            assert not possible
            return
        assert possible
        assert len(blocks) == len(set(blocks)) == count
        if run and count:
            assert list(blocks) == list(range(blocks[0], blocks[0] + count))
        for block in blocks:
            assert self.refs[block] == 0
            self.refs[block] = 1

    @rule(data=st.data())
    def retain_or_release(self, data: st.DataObject) -> None:
        retain = data.draw(st.booleans())
        blocks = data.draw(st.lists(st.sampled_from(range(len(self.refs))), max_size=5))
        refs = list(self.refs)
        try:
            (self.pool.retain if retain else self.pool.release)(blocks)
        except IntegrityError:
            if retain:
                assert any(self.refs[block] == 0 for block in blocks)
            else:
                assert any(self.refs[block] < blocks.count(block) for block in blocks)
            return
        for block in blocks:
            refs[block] += 1 if retain else -1
        assert min(refs) >= 0
        self.refs = refs

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pool"):
            self.pool.verify()
            assert [self.pool.num_holders(block) for block in range(len(self.refs))] == self.refs


class ManagerMachine(RuleBasedStateMachine):
    """The manager against dictionaries of lengths; which blocks it takes is its own affair, how many is not."""

    mode: CacheMode = "paged"

    @initialize(num_blocks=st.integers(1, 14), block_size=st.integers(1, 5))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.cache = CacheManager(num_blocks, block_size, self.mode)
        self.history: dict[int, int] = {}
        self.committed: dict[int, int] = {}
        self.reserve: dict[int, int] = {}

    def blocks(self, seq_id: int, num_tokens: int) -> int:
        longest = self.reserve[seq_id] if self.mode == "contiguous" else num_tokens
        return -(-longest // self.cache.block_size)

    def taken(self) -> int:
        return sum(self.blocks(seq_id, history) for seq_id, history in self.history.items())

    @rule(seq_id=st.integers(0, 5), num_tokens=st.integers(0, 20), more=st.integers(0, 10))
    def open(self, seq_id: int, num_tokens: int, more: int) -> None:
        if seq_id in self.history:
            return
        reserve = num_tokens + more
        possible = self.cache.can_open(num_tokens, reserve)
        try:
            self.cache.open(seq_id, num_tokens, reserve)
        except CapacityError:
            assert not possible
            return
        assert possible
        self.reserve[seq_id] = reserve
        self.history[seq_id] = 0 if self.mode == "none" else num_tokens
        self.committed[seq_id] = 0

    @precondition(lambda self: self.history)
    @rule(data=st.data(), num_tokens=st.integers(0, 30))
    def resize(self, data: st.DataObject, num_tokens: int) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.history)))
        free = self.cache.num_blocks - self.taken()
        need = -(-num_tokens // self.cache.block_size) - len(self.cache.block_table(seq_id))
        possible = need <= (0 if self.mode == "contiguous" else free)
        assert self.cache.can_resize(seq_id, num_tokens) == possible
        try:
            self.cache.resize(seq_id, num_tokens)
        except CapacityError:
            assert not possible
            return
        assert possible
        self.history[seq_id] = num_tokens
        self.committed[seq_id] = min(self.committed[seq_id], num_tokens)

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.history)))
        num_tokens = data.draw(st.integers(self.committed[seq_id], self.history[seq_id]))
        self.cache.commit(seq_id, num_tokens)
        self.committed[seq_id] = 0 if self.mode == "none" else num_tokens
        if self.mode == "none":
            self.history[seq_id] = 0

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.history)))
        self.cache.close(seq_id)
        del self.history[seq_id], self.committed[seq_id], self.reserve[seq_id]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.verify()
        stats = self.cache.stats()
        assert stats.num_active_blocks == self.taken()
        assert stats.num_positions == sum(self.history.values())
        assert {s: self.cache.num_history(s) for s in self.history} == self.history
        assert {s: self.cache.num_committed(s) for s in self.history} == self.committed

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for seq_id in list(self.history):
                self.cache.close(seq_id)
            assert self.cache.num_free_blocks == self.cache.num_blocks


class ContiguousMachine(ManagerMachine):
    mode: CacheMode = "contiguous"


class RecomputeMachine(ManagerMachine):
    mode: CacheMode = "none"


TestPoolModel = PoolMachine.TestCase
TestPagedModel = ManagerMachine.TestCase
TestContiguousModel = ContiguousMachine.TestCase
TestRecomputeModel = RecomputeMachine.TestCase
TestPoolModel.settings = SETTINGS
TestPagedModel.settings = SETTINGS
TestContiguousModel.settings = SETTINGS
TestRecomputeModel.settings = SETTINGS
