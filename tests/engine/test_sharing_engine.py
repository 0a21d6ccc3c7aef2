"""What failures, quotas, pins and a new size leave behind in a cache that requests share."""

from __future__ import annotations

from array import array

import pytest

from pagemill.base.errors import CapacityError
from pagemill.base.params import CacheOptions, SamplingParams
from pagemill.base.step import SampleFailure, StepPlan, StepResult
from pagemill.cache.entry import SharingConfig
from tests.fixtures.fake_engine import Rig

SIZE = 4


def make(num_blocks: int = 64, **options: object) -> Rig:
    return Rig(num_blocks, SIZE, vocab_size=1000, sharing=SharingConfig(), **options)  # type: ignore[arg-type]


def add(rig: Rig, name: str, prompt: list[int], tenant: str, max_tokens: int = 8) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
    rig.engine.add_request(name, prompt, params, cache=CacheOptions(tenant))


def test_a_failed_step_that_ends_the_last_request_leaves_no_page_unwiped() -> None:
    rig = make(fault=lambda step: step == 1)
    rig.add("a", list(range(9)), max_tokens=4)
    rig.run()
    assert rig.answers["a", 0].finish_reason == "error"


def test_what_a_row_without_an_answer_wrote_is_not_found_by_others() -> None:
    rig = make()
    run = rig.executor.run

    def nothing_came(plan: StepPlan) -> StepResult:
        result = run(plan)
        failures = tuple(SampleFailure(each.seq_id, "not a number") for each in result.samples)
        return result._replace(samples=(), failures=failures)

    rig.executor.run = nothing_came  # type: ignore[method-assign]
    rig.add("bad", list(range(17)))
    rig.run()
    rig.executor.run = run  # type: ignore[method-assign]
    rig.add("good", list(range(17)))
    rig.run()
    assert rig.answers["good", 0].deltas[-1].num_cached_tokens == 0


def test_a_tenant_at_its_cap_takes_nothing_from_others() -> None:
    rig = make()
    shared = rig.cache.shared
    assert shared is not None
    shared.set_quota("capped", 0, 4)
    add(rig, "capped", list(range(13)), "capped", max_tokens=30)
    for index in range(5):
        add(rig, f"other {index}", list(range(100 + index, 110 + index)), "other", max_tokens=20)
    rig.run()
    assert rig.engine.stats().num_preemptions == 0
    assert rig.answers["capped", 0].finish_reason == "length"
    assert len(rig.tokens("capped")) == 4 * SIZE + 1 - 13
    assert all(rig.answers[f"other {i}", 0].finish_reason == "length" for i in range(5))


@pytest.mark.parametrize(("num_prompt", "num_told"), [(30, 0), (10, 3)])
def test_own_pins_that_fill_a_cap_are_named_with_it(num_prompt: int, num_told: int) -> None:
    rig = Rig(44, SIZE, max_model_len=64, vocab_size=1000, sharing=SharingConfig())
    shared, options = rig.cache.shared, CacheOptions("capped")
    assert shared is not None
    shared.set_quota("capped", 0, 10)
    add(rig, "first", list(range(29)), "capped", max_tokens=1)
    rig.run()
    assert shared.pin(options, array("i", range(28)), 60.0).num_tokens == 28  # of 10 blocks, 7 are pinned
    add(rig, "next", list(range(100, 100 + num_prompt)), "capped", max_tokens=9)
    while rig.engine.has_unfinished:
        rig.step()
    error = rig.answers["next", 0].deltas[-1].error
    assert isinstance(error, CapacityError)
    assert len(rig.tokens("next")) == num_told
    assert f"needs {8 if num_prompt == 30 else 4} blocks" in str(error)
    assert "tenant 'capped' may have 10 and its pins hold 7 of them; unpin some" in str(error)
    assert "or raise the tenant's quota" in str(error)
    assert error.retry_after_s


def test_pins_that_fill_the_memory_are_no_matter_of_a_cap() -> None:
    rig = Rig(12, SIZE, max_model_len=64, vocab_size=1000, sharing=SharingConfig())
    shared = rig.cache.shared
    assert shared is not None
    shared.set_quota("capped", 0, 12)
    texts = {"capped": list(range(20)), "other": list(range(50, 54))}
    for tenant, text in texts.items():
        add(rig, tenant, [*text, 99], tenant, max_tokens=1)
    rig.run()
    for tenant, text in texts.items():
        shared.pin(CacheOptions(tenant), array("i", text), 60.0)
    add(
        rig, "next", [*range(12), *range(100, 128)], "capped", max_tokens=1
    )  # 3 blocks are there, 7 are missing and 6 free
    while rig.engine.has_unfinished:
        rig.step()
    assert "pins hold 6 of 12; unpin some" in str(rig.answers["next", 0].deltas[-1].error)


def test_two_of_a_capped_tenant_give_way_to_each_other() -> None:
    rig = make()
    shared = rig.cache.shared
    assert shared is not None
    shared.set_quota("capped", 0, 6)
    add(rig, "first", list(range(8)), "capped", max_tokens=10)
    add(rig, "second", list(range(50, 58)), "capped", max_tokens=10)
    add(rig, "other", list(range(90, 98)), "other", max_tokens=10)
    rig.run()
    assert {answer.finish_reason for answer in rig.answers.values()} == {"length"}


def test_room_for_others_to_grow_is_no_part_of_a_tenants_cap() -> None:
    rig = make()
    shared = rig.cache.shared
    assert shared is not None
    shared.set_quota("capped", 0, 5)
    for index in range(4):
        add(rig, f"other {index}", list(range(100 * index, 100 * index + 9)), "other", max_tokens=40)
    add(rig, "capped", [7] * 10, "capped", max_tokens=4)
    for _ in range(3):
        rig.step()
    assert rig.engine.stats().num_running == 5


def test_a_pin_counts_from_now_and_not_from_the_last_step() -> None:
    rig = make()
    rig.add("a", list(range(9)), max_tokens=2)
    rig.run()
    shared = rig.cache.shared
    assert shared is not None
    rig.clock.advance(100.0)
    rig.engine.advance_clock()
    lease = shared.pin(CacheOptions(), array("i", range(9)), 60.0)
    assert lease.expires_s == pytest.approx(rig.clock.now() + 60.0)


def test_a_prompt_that_pins_keep_out_says_so_and_when_to_try_again() -> None:
    rig = make(8)
    rig.add("a", list(range(13)), max_tokens=2)
    rig.run()
    shared = rig.cache.shared
    assert shared is not None
    rig.engine.advance_clock()
    shared.pin(CacheOptions(), array("i", range(14)), 60.0)
    rig.add("b", list(range(100, 127)), max_tokens=2)
    while rig.engine.has_unfinished:
        rig.step()
    error = rig.answers["b", 0].deltas[-1].error
    assert isinstance(error, CapacityError)
    assert "pins hold" in str(error)
    assert error.retry_after_s


@pytest.mark.parametrize("at", ["copies", "memory"])
def test_a_smaller_size_that_fails_loses_no_sequence_and_no_block(at: str) -> None:
    rig = make(40)
    for index in range(3):
        rig.add(f"done {index}", list(range(100 * index, 100 * index + 40)), max_tokens=2)
    rig.run()
    rig.add("live", list(range(500, 530)), max_tokens=30)
    for _ in range(4):
        rig.step()
    run, resize = rig.executor.run, rig.executor.resize

    def fails(*arguments: object) -> None:
        raise CapacityError("no memory")

    if at == "copies":
        rig.executor.run = fails  # type: ignore[method-assign, assignment]
    rig.executor.resize = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(CapacityError, match="no memory"):
        rig.engine.resize_cache(16)
    rig.executor.run, rig.executor.resize = run, resize  # type: ignore[method-assign]
    rig.cache.verify()
    stats = rig.cache.stats()
    assert (stats.num_blocks, stats.num_held_blocks) == (40, 0)
    rig.run()
    assert rig.answers["live", 0].finish_reason == "length"
    rig.engine.resize_cache(16)
    assert rig.cache.num_blocks == 16
