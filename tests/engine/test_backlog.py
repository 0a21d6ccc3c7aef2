"""Who may wait: bounds of one tenant and of all, room for newcomers, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemill.base.errors import QueueFullError
from pagemill.engine.backlog import Backlog
from tests.fixtures.fake_engine import Rig


def fill(backlog: Backlog, tenants: list[str]) -> dict[str, int]:
    """Requests that each tenant brings in, each of them asking over and over in turn; nothing runs."""
    queued = dict.fromkeys(tenants, 0)
    open_to = set(tenants)
    while open_to:
        for tenant in tenants:
            try:
                backlog.check(tenant, queued[tenant], sum(queued.values()), 0)
                queued[tenant] += 1
            except QueueFullError:
                open_to.discard(tenant)
    return queued


def test_without_a_limit_anybody_may_wait() -> None:
    Backlog(None).check("t", 10**9, 10**9, 0)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_one_tenant_alone_has_exactly_the_limit(limit: int) -> None:
    assert fill(Backlog(limit), ["only"]) == {"only": limit}


def test_who_comes_new_finds_room_beside_a_flood() -> None:
    backlog = Backlog(100)
    backlog.check("new", 0, 100, 0)
    with pytest.raises(QueueFullError) as full:
        backlog.check("flood", 100, 100, 0)
    assert full.value.status == 429
    assert "tenant 'flood' has 100 requests waiting, and max_queued_requests is 100" in str(full.value)


@given(st.integers(1, 200), st.integers(1, 12))
def test_all_together_stay_within_a_quarter_more(limit: int, count: int) -> None:
    queued = fill(Backlog(limit), [str(index) for index in range(count)])
    assert sum(queued.values()) <= limit + -(-limit // 4)
    assert max(queued.values()) <= limit


def test_when_all_together_are_too_many_it_is_not_the_tenants_fault() -> None:
    with pytest.raises(QueueFullError) as full:
        Backlog(4).check("small", 1, 5, 0)
    assert full.value.status == 503
    assert "all tenants have 5 requests waiting" in str(full.value)


def test_those_that_can_run_at_once_do_not_wait() -> None:
    Backlog(1).check("t", 3, 3, 4)
    Backlog(1).check("t", 4, 4, 4)
    with pytest.raises(QueueFullError):
        Backlog(1).check("t", 5, 5, 4)


def test_time_to_come_back_follows_the_pace_of_finishing() -> None:
    backlog = Backlog(10)
    assert backlog.retry_after_s(10) == 1.0
    for index in range(50):
        backlog.finished(2.0 * index, num_running=3)
    assert backlog.retry_after_s(10) == 10.0, "half of ten, at two seconds each"
    backlog.finished(100.0, num_running=0)
    backlog.finished(1e6, num_running=1)
    assert backlog.retry_after_s(10) == 10.0, "idle time is no pace"
    assert backlog.retry_after_s(10**9) == 600.0


def test_a_refused_request_changes_nothing_and_others_go_on() -> None:
    rig = Rig(max_num_seqs=2, max_queued_requests=3)
    for index in range(5):
        rig.add(f"r{index}", [1 + index, 2, 3], max_tokens=4)
    before = rig.engine.stats()
    with pytest.raises(QueueFullError) as full:
        rig.add("one more", [9, 9], max_tokens=4)
    assert full.value.retry_after_s >= 1.0
    assert rig.engine.stats() == before
    rig.run()
    assert len(rig.answers) == 5
    rig.add("one more", [9, 9], max_tokens=4)
    rig.run()
    assert rig.answers["one more", 0].finish_reason == "length"


def test_an_aborted_request_makes_room_in_the_queue() -> None:
    rig = Rig(max_num_seqs=1, max_queued_requests=1)
    rig.add("a", [1, 2], max_tokens=4)
    rig.add("b", [1, 3], max_tokens=4)
    with pytest.raises(QueueFullError):
        rig.add("c", [1, 4], max_tokens=4)
    rig.abort("b")
    rig.add("c", [1, 4], max_tokens=4)
    rig.run()
