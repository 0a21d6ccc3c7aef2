"""Names cost no memory: accounts, roots and secrets that nothing is lost with are dropped, others are kept."""

from __future__ import annotations

import time
from array import array
from typing import Literal

import pytest

from pagemill.base.errors import RequestError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.cache.entry import SharingConfig
from pagemill.cache.manager import CacheManager
from pagemill.cache.prefix import MOST_EMPTY_ROOTS
from pagemill.cache.sharing import SharedBlocks
from pagemill.cache.tenancy import MOST_IDLE_ACCOUNTS
from tests.cache.test_tenancy import make, num_kept, store, text
from tests.fixtures.fake_engine import Rig


def sizes(shared: SharedBlocks) -> tuple[int, int, int]:
    return len(shared.tenancy.accounts), len(shared.tree._roots), len(shared.secrets)


@pytest.mark.parametrize("kind", ["tenant", "salt"])
def test_many_names_do_not_pile_up(kind: str) -> None:
    cache, shared = make(8)
    for index in range(12_000):
        options = CacheOptions(f"tenant {index}") if kind == "tenant" else CacheOptions("t", f"salt {index}")
        tokens = array("i", [index, 1, 2, 3, 4, 5])
        cache.open(0, 6, 100, tokens, options)
        cache.commit(0, 6)
        cache.close(0)
        cache.moved(cache.moves())
    cache.verify()
    assert max(sizes(shared)) <= MOST_EMPTY_ROOTS + MOST_IDLE_ACCOUNTS + 16
    if kind == "tenant":
        assert len(shared.tenancy.accounts) <= MOST_IDLE_ACCOUNTS + 16


def test_names_that_are_only_asked_for_do_not_pile_up() -> None:
    cache, shared = make(8)
    for index in range(5000):
        cache.cap_error(6, CacheOptions(f"tenant {index}"))
    assert len(shared.tenancy.accounts) <= MOST_IDLE_ACCOUNTS + 16


def test_an_idle_account_comes_back_as_a_new_one() -> None:
    cache, shared = make(20)
    store(cache, text(1, 3), CacheOptions("a"))
    before = shared.account_of(CacheOptions("a"))
    shared.purge_tenant("a")
    assert before in shared.tenancy.drop_idle()
    assert store(cache, text(1, 3), CacheOptions("a")) == 0
    assert store(cache, text(1, 3), CacheOptions("a")) == 11
    assert shared.account_of(CacheOptions("a")).used == 3


def test_accounts_with_blocks_sequences_pins_or_a_name_from_the_operator_are_kept() -> None:
    cache, shared = make(40)
    store(cache, text(1, 3), CacheOptions("cached"))
    store(cache, text(2, 3), CacheOptions("pinned"))
    shared.pin(CacheOptions("pinned"), text(2, 3), 10.0)
    cache.open(1, 0, 100, array("i"), CacheOptions("running"))
    shared.set_quota("named", 0, None)
    shared.set_quota("floored", 4, None)
    cache.cap_error(1, CacheOptions("idle"))
    assert [each.name for each in shared.tenancy.drop_idle()] == ["idle"]
    names = {each.name for each in shared.tenancy.accounts}
    assert names == {"default", "cached", "pinned", "running", "named", "floored", ""}
    cache.close(1)
    assert [each.name for each in shared.tenancy.drop_idle()] == ["running"]


def test_a_place_that_was_dropped_is_taken_by_the_next_tenant_without_its_past() -> None:
    cache, shared = make(20)
    shared.set_quota("old", 4, 9)
    store(cache, text(1, 5), CacheOptions("old"))
    index = shared.account_of(CacheOptions("old")).index
    assert shared.remove_tenant("old") == 5
    shared.tenancy.drop_idle()
    store(cache, text(1, 12), CacheOptions("new"))
    account = shared.account_of(CacheOptions("new"))
    assert (account.index, account.floor, account.cap, account.partition) == (index, 0, None, 0)
    assert (account.used, account.cached) == (12, 12)
    cache.verify()


def test_a_running_sequence_publishes_though_a_flood_of_salts_comes_in_between() -> None:
    cache, shared = make(20)
    options, tokens = CacheOptions("t", "mine"), text(1, 4)
    cache.open(1, len(tokens), 100, tokens, options)
    for index in range(2 * MOST_EMPTY_ROOTS):
        shared.entry(CacheOptions("flood", str(index)), array("i", [1, 2, 3]), 3)
    cache.moved(cache.moves())
    cache.commit(1, len(tokens))
    cache.close(1)
    cache.verify()
    assert num_kept(shared, tokens, options) == 4


def test_a_flood_of_names_costs_no_more_for_each_than_a_few() -> None:
    """Names are swept so seldom that a sweep costs each of them O(1): counted as time of the second half over that of
    the first, which a sweep at every name would double."""
    cache, shared = make(8)
    halves = []
    for half in range(2):
        begin = time.process_time()
        for index in range(20_000):
            shared.account_of(CacheOptions(f"{half} {index}"))
        halves.append(time.process_time() - begin)
    assert halves[1] < 4 * halves[0]
    assert cache.stats().num_sequences == 0


def test_only_known_tenants_enter_where_the_operator_says_so() -> None:
    cache = CacheManager(20, 4, "paged", SharingConfig(known_tenants_only=True))
    shared = cache.shared
    assert shared is not None
    cache.grant("known")
    cache.declare_public("docs")
    store(cache, text(1, 3), CacheOptions("known"))
    store(cache, text(1, 3), CacheOptions("known", public="docs"))
    for stranger in (CacheOptions("stranger"), CacheOptions(), CacheOptions("stranger", public="docs")):
        with pytest.raises(RequestError, match="is unknown; the operator names tenants") as caught:
            cache.check_options(stranger)
        assert caught.value.status == 403
    assert shared.purge_tenant("known") == 3
    assert shared.remove_tenant("known") == 0
    with pytest.raises(RequestError, match="'known' is unknown"):
        cache.check_options(CacheOptions("known"))
    for refused in (shared.purge_tenant, shared.remove_tenant):
        for stranger in ("known", "stranger", "default"):
            with pytest.raises(RequestError, match=f"'{stranger}' is unknown"):
                refused(stranger)


def test_what_a_removed_tenant_still_leaves_can_be_purged() -> None:
    cache = CacheManager(20, 4, "paged", SharingConfig(known_tenants_only=True))
    shared = cache.shared
    assert shared is not None
    cache.grant("gone")
    assert shared.remove_tenant("gone") == 0
    store(cache, text(1, 3), CacheOptions("gone"))  # a request that waited
    assert shared.purge_tenant("gone") == 3
    with pytest.raises(RequestError, match="'gone' is unknown"):
        shared.purge_tenant("gone")


@pytest.mark.parametrize("mode", ["paged", "contiguous", "none"])
def test_without_a_prefix_cache_there_is_no_public_namespace_either(
    mode: Literal["paged", "contiguous", "none"],
) -> None:
    cache = CacheManager(20, 4, mode)
    cache.check_options(CacheOptions("anyone", "salted"))
    with pytest.raises(RequestError, match="no public namespace 'docs'") as caught:
        cache.check_options(CacheOptions(public="docs"))
    assert caught.value.status == 403


def test_a_request_that_waits_runs_on_though_its_tenant_is_removed() -> None:
    rig = Rig(12, 4, vocab_size=200, sharing=SharingConfig(known_tenants_only=True))
    shared = rig.cache.shared
    assert shared is not None
    params = SamplingParams(max_tokens=9, temperature=0.0, seed=0)
    for tenant in ("gone", "stays"):
        rig.cache.grant(tenant)
        for index in range(3):
            rig.engine.add_request(f"{tenant} {index}", range(index, index + 14), params, cache=CacheOptions(tenant))
    rig.step()
    shared.remove_tenant("gone")
    with pytest.raises(RequestError, match="'gone' is unknown"):
        rig.engine.add_request("late", range(4), params, cache=CacheOptions("gone"))
    rig.run()
    assert {answer.finish_reason for answer in rig.answers.values()} == {"length"}
    for options in (CacheOptions("gone"), CacheOptions("stays", public="docs")):
        for refused in (shared.purge_text, shared.purge_prefix):
            with pytest.raises(RequestError):
                refused(options, array("i", [1, 2]))
        with pytest.raises(RequestError):
            shared.pin(options, array("i", [1, 2]), 1.0)
