"""Receipts and the rate behind their seconds."""

from __future__ import annotations

from array import array

from pagemill.base.params import SamplingParams
from pagemill.base.step import SequenceStep, StepPlan
from pagemill.cache.entry import SharingConfig
from pagemill.cache.receipt import Lookup, Miss
from pagemill.engine.receipt import PrefillRate
from tests.fixtures.fake_engine import Rig


def plan(*counts: int) -> StepPlan:
    params = SamplingParams()
    rows = (SequenceStep(i, array("i", [1] * n), 0, (), True, params, 0) for i, n in enumerate(counts))
    return StepPlan(tuple(rows))


def test_the_rate_follows_steps_that_read_prompts_and_no_others() -> None:
    rate = PrefillRate()
    rate.saw(plan(1, 1, 1), 1.0)
    rate.saw(plan(100), 0.0)
    assert rate.seconds_per_token == 0.0
    rate.saw(plan(100), 0.5)
    assert rate.seconds_per_token == 0.005
    for _ in range(60):
        rate.saw(plan(100), 1.0)
    assert 0.0099 < rate.seconds_per_token <= 0.01
    assert rate.receipt(50, Lookup(49, 40, 40)).saved_s == 40 * rate.seconds_per_token


def test_a_slow_first_step_of_few_tokens_counts_for_little_beside_a_long_prompt() -> None:
    rate = PrefillRate()
    rate.saw(plan(40), 0.6)
    rate.saw(plan(384), 0.192)
    assert 0.0005 < rate.seconds_per_token < 0.001


def test_a_receipt_reads_as_a_sentence_and_as_json() -> None:
    rate = PrefillRate()
    rate.saw(plan(100), 1.0)
    receipt = rate.receipt(50, Lookup(49, 40, 40, Miss("evicted", 40, 2.5, "lru")))
    assert str(receipt) == "cache: 40 of 50 prompt tokens, about 0.4 s saved; then evicted 2.5 s ago by lru"
    assert receipt.describe() == {
        "cached_tokens": 40,
        "computed_tokens": 10,
        "tiers": {"hot": 40},
        "saved_s": 40 * rate.seconds_per_token,
        "miss": {"kind": "evicted", "reason": "evicted 2.5 s ago by lru", "token": 40},
    }


def test_hits_are_counted_once_and_not_after_preemption() -> None:
    rig = Rig(num_blocks=14, block_size=4, max_num_batched_tokens=64, sharing=SharingConfig())
    rig.add("first", range(1, 13), max_tokens=2)
    rig.run()
    for name in ("a", "b", "c"):
        rig.add(name, [*range(1, 13), ord(name)], max_tokens=24)
    rig.run()
    assert rig.engine.stats().num_preemptions > 0
    for name in ("a", "b", "c"):
        last = rig.answers[name, 0].deltas[-1]
        assert last.num_cached_tokens == 12
        assert last.receipt is not None
        assert last.receipt.num_computed_tokens == 1


def test_choices_wait_for_the_prompt_that_they_share() -> None:
    rig = Rig(num_blocks=64, block_size=4, max_num_batched_tokens=8, sharing=SharingConfig())
    rig.add("a", range(1, 22), max_tokens=3, n=3, temperature=1.0)
    rig.run()
    prompt_rows = [row for rows in rig.rows for row in rows if row.start < 21]
    assert [(row.seq_id, row.start, row.count) for row in prompt_rows] == [
        (1, 0, 8), (1, 8, 8), (1, 16, 5), (2, 20, 1), (3, 20, 1),
    ]  # fmt: skip
