"""What is remembered of blocks that left: behind which block, how many, and what comes back or is forgotten."""

from __future__ import annotations

from random import Random

import pytest

from pagemill.cache.block import Node
from pagemill.cache.evicted import EvictedBlocks


def root() -> Node:
    return Node(-1, b"root", b"", None, -1)


def chain(parent: Node, *texts: bytes) -> list[Node]:
    """Blocks each behind the one before it, as if published."""
    found = []
    for text in texts:
        parent = Node(0, parent.key + text, text, parent, parent.depth + 1)
        found.append(parent)
    return found


def leave(memory: EvictedBlocks, nodes: list[Node], now_s: float = 0.0) -> None:
    memory.add(nodes[::-1], now_s)


def test_the_last_ones_are_remembered_and_no_more() -> None:
    memory, start = EvictedBlocks(3), root()
    blocks = [chain(start, b"%04d" % index)[0] for index in range(5)]
    for at, block in enumerate(blocks):
        leave(memory, [block], float(at))
    assert len(memory) == 3
    assert [memory.find(start, block.tokens) for block in blocks] == [None, None, *blocks[2:]]
    assert blocks[4].left_s == 4.0
    memory.resize(1)
    assert memory.behind(start) == [blocks[4]]


def test_a_chain_is_found_block_by_block_and_forgotten_from_its_end() -> None:
    memory, start = EvictedBlocks(4), root()
    blocks = chain(start, b"aaaa", b"bbbb", b"cccc")
    leave(memory, blocks)
    assert memory.find(start, b"aaaa") is blocks[0]
    assert memory.find(blocks[1], b"cccc") is blocks[2]
    leave(memory, chain(root(), b"dddd", b"eeee"))
    assert memory.find(blocks[0], b"bbbb") is blocks[1]
    assert memory.find(blocks[1], b"cccc") is None


def test_of_several_the_latest_with_a_first_token_is_told() -> None:
    memory, start = EvictedBlocks(8), root()
    first, second, other = (chain(start, text)[0] for text in (b"aaaa1111", b"aaaa2222", b"bbbb3333"))
    for block in (first, second, other):
        leave(memory, [block])
    assert memory.latest(start, b"aaaa") is second
    assert memory.latest(start, b"bbbb") is other
    assert memory.latest(start, b"cccc") is None
    memory.forget(other)
    assert memory.latest(start, b"bbbb") is None


@pytest.mark.parametrize("endings", [1, 3])
def test_what_came_back_is_no_longer_remembered_and_what_lay_behind_it_is(endings: int) -> None:
    memory, start = EvictedBlocks(8), root()
    old = chain(start, b"aaaa", b"bbbb")
    ends = [chain(old[1], b"%04d" % index)[0] for index in range(endings)]
    leave(memory, [*old, *ends])
    again = chain(start, b"aaaa", b"bbbb", b"zzzz")
    memory.came_back(again)
    assert len(memory) == endings
    assert memory.find(start, b"aaaa") is None
    assert sorted(each.tokens for each in memory.behind(again[1])) == [each.tokens for each in ends]
    leave(memory, again)
    assert len(memory) == endings + 3
    memory.forget(again[0])
    assert len(memory) == 0


def test_what_is_forgotten_holds_no_text() -> None:
    memory, start = EvictedBlocks(8), root()
    blocks = chain(start, b"aaaa", b"bbbb")
    leave(memory, blocks)
    memory.forget_behind(start)
    assert [(each.tokens, each.key, each.parent) for each in blocks] == [(b"", b"", None)] * 2


def test_all_is_forgotten_at_once() -> None:
    memory, start = EvictedBlocks(8), root()
    blocks = [*chain(start, b"aaaa", b"bbbb"), *chain(start, b"cccc")]
    leave(memory, blocks)
    memory.clear()
    assert len(memory) == 0
    assert memory.behind(start) == []
    assert all(each.tokens == b"" and each.left_s is None for each in blocks)


def test_any_coming_and_going_agrees_with_a_list_of_texts() -> None:
    """Chains of up to three blocks of two letters leave and come back; a list keeps what should be remembered."""
    for seed in range(20):
        random, memory, start = Random(seed), EvictedBlocks(12), root()
        alive: dict[tuple[bytes, ...], Node] = {(): start}
        gone: list[tuple[bytes, ...]] = []
        for _ in range(300):
            name = tuple(random.choice((b"aaaa", b"bbbb", b"cccc")) for _ in range(random.randrange(1, 4)))
            leaves = [each for each in alive if each and not any(other[:-1] == each for other in alive)]
            if random.random() < 0.5 and leaves:
                name = random.choice(leaves)
                memory.add([alive.pop(name)], 0.0)
                gone = [*gone, name][-12:]
                continue
            known = next(at for at in range(len(name), -1, -1) if name[:at] in alive)
            nodes = chain(alive[name[:known]], *name[known:])
            memory.came_back(nodes)
            for at, node in enumerate(nodes, known + 1):
                alive[name[:at]] = node
            gone = [each for each in gone if each not in alive]
        assert len(memory) == len(gone)
        assert {each.tokens for each in memory.behind(start)} == {each[0] for each in gone if len(each) == 1}
        assert len(memory._order) <= 2 * len(memory) + 64
