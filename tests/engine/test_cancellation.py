"""A client that leaves, in every state that a request can be in: its blocks are free before the next step, nobody else
notices, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagemill.base.params import CacheOptions
from pagemill.cache.entry import SharingConfig
from tests.fixtures.fake_engine import Rig
from tests.fixtures.fake_executor import answer

A, B = CacheOptions(tenant="a"), CacheOptions(tenant="b")
OTHER = [200, 201, 202, 203]


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + 7 * i) % 256 for i in range(length)]


def waiting_for_a_place() -> Rig:
    rig = Rig(max_num_seqs=1)
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(4), max_tokens=4)
    rig.step()
    assert rig.engine.stats().num_waiting == 1
    return rig


def waiting_for_room() -> Rig:
    rig = Rig(num_blocks=8)
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(28), max_tokens=4)
    rig.step()
    assert rig.engine.stats().num_waiting == 1
    return rig


def waiting_at_its_tenants_cap() -> Rig:
    rig = Rig(sharing=SharingConfig())
    assert rig.cache.shared is not None
    rig.cache.shared.set_quota("a", 0, 6)
    rig.add("other", OTHER, A, max_tokens=20)
    rig.add("gone", prompt(20), A, max_tokens=2)
    rig.step()
    assert rig.engine.stats().num_waiting == 1
    return rig


def waiting_for_a_prompt_that_is_being_read() -> Rig:
    rig = Rig(num_blocks=128, max_num_batched_tokens=16, max_model_len=256, sharing=SharingConfig())
    rig.add("other", OTHER, max_tokens=20)
    rig.add("reads", prompt(150), max_tokens=2)
    rig.add("gone", [*prompt(150), 9], max_tokens=2)
    for _ in range(3):
        rig.step()
    assert rig.engine.stats().num_waiting == 1
    return rig


def reading_its_prompt() -> Rig:
    rig = Rig(max_num_batched_tokens=8)
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(40), max_tokens=4)
    for _ in range(2):
        rig.step()
    assert 0 < rig.rows[-1][1].count < 40
    return rig


def decoding() -> Rig:
    rig = Rig()
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(4), max_tokens=30)
    for _ in range(4):
        rig.step()
    return rig


def between_its_choices() -> Rig:
    rig = Rig(max_num_seqs=3, sharing=SharingConfig())
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(9), n=4, temperature=1.0, max_tokens=30)
    for _ in range(3):
        rig.step()
    assert (rig.engine.stats().num_running, rig.engine.stats().num_waiting) == (3, 2)
    return rig


def until_preempted(rig: Rig) -> Rig:
    while not rig.engine.stats().num_preemptions:
        rig.step()
    return rig


def with_its_tail_dropped() -> Rig:
    rig = Rig(num_blocks=8, max_num_batched_tokens=64)
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(4), max_tokens=24)
    assert until_preempted(rig).engine.stats().num_tails_dropped == 1
    return rig


def sent_back() -> Rig:
    rig = Rig(num_blocks=7, max_num_batched_tokens=64, sharing=SharingConfig())
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(4), max_tokens=20)
    assert until_preempted(rig).engine.stats().num_waiting == 1
    return rig


def displaced_by_another_tenant() -> Rig:
    rig = Rig(max_num_seqs=2, sharing=SharingConfig())
    rig.add("first", prompt(4, 90), A, max_tokens=30)
    rig.add("gone", prompt(4), A, max_tokens=30)
    for _ in range(4):
        rig.step()
    rig.add("other", OTHER, B, max_tokens=20)
    assert until_preempted(rig).engine.stats().num_waiting == 1
    return rig


def out_of_blocks_in_its_place() -> Rig:
    rig = Rig(num_blocks=6, max_num_batched_tokens=64)
    rig.add("other", OTHER, max_tokens=20)
    rig.add("gone", prompt(8, 50), max_tokens=9)
    for _ in range(40):
        if len(rig.rows) > 1 and len(rig.rows[-1]) == 1:
            break
        rig.step()
    assert (rig.engine.stats().num_running, len(rig.rows[-1])) == (2, 1)
    return rig


STATES: list[Callable[[], Rig]] = [
    waiting_for_a_place,
    waiting_for_room,
    waiting_at_its_tenants_cap,
    waiting_for_a_prompt_that_is_being_read,
    reading_its_prompt,
    decoding,
    between_its_choices,
    with_its_tail_dropped,
    sent_back,
    displaced_by_another_tenant,
    out_of_blocks_in_its_place,
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_client_that_leaves_frees_its_blocks_at_once(state: Callable[[], Rig]) -> None:
    rig = state()
    deltas = rig.abort("gone")
    assert {delta.finish_reason for delta in deltas} == {"abort"}
    assert all(sequence.request.request_id != "gone" for sequence in rig.engine._scheduler.running)
    held = sum(len(rig.cache.block_table(each.seq_id)) for each in rig.engine._scheduler.running)
    assert rig.cache.stats().num_active_blocks <= held, "a block is held for nobody who runs"
    rig.run()
    assert rig.tokens("other") == answer(OTHER, 20, 256)
    assert rig.abort("gone") == []


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_everybody_may_leave_at_once(state: Callable[[], Rig]) -> None:
    rig = state()
    for name in ("gone", "other", "first", "reads"):
        rig.abort(name)
    rig.assert_empty()
    assert rig.engine._scheduler.shares.num_known == 0
    rig.add("next", prompt(5), max_tokens=3)
    rig.run()
    assert rig.tokens("next") == answer(prompt(5), 3, 256)
